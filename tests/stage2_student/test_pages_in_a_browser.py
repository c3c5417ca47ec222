"""Pages in a real browser: texts stay text, nothing is fetched or run, every step works, and a phone is wide enough."""

from click.testing import CliRunner
from page_browser import PHONE, look_at
from page_inputs import HOSTILE, run_page, write_suite

from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.scores.page.run_page import render_run_page
from vlm_distill_cache.stage2_student.suite.page import write_suite_page


def test_texts_of_an_attackers_stay_text_on_a_phone_in_the_dark(tmp_path):
    """The last page is one with a script put in by hand: the pages' policy stops it, and the test can see one that runs."""
    render_run_page(tmp_path / "run.html", run_page(HOSTILE))
    for seed in range(2):
        write_suite(tmp_path / f"suite{seed}", seed=seed, name=f"student{HOSTILE}", text=HOSTILE)
    write_suite_page(tmp_path / "suite0")
    compared = CliRunner().invoke(
        main,
        ["compare", *(str(tmp_path / f"suite{seed}") for seed in range(2)), "--output", str(tmp_path / "both.html")],
    )
    assert compared.exit_code == 0, compared.output
    pages = [
        path.read_text()
        for path in (tmp_path / "run.html", tmp_path / "suite0" / "report.html", tmp_path / "both.html")
    ]
    forced = "<script>top.ran.push('forced')</script>"
    told = look_at([*pages, pages[0].replace("</body>", f"{forced}</body>"), forced], tmp_path, dark=True)
    assert told["ran"] == ["forced"]  # of the page without a policy
    for page in told["pages"][:3]:
        assert not {"script", "link", "iframe", "object", "form", "base"} & set(page["names"])
        assert page["handlers"] == page["broken"] == 0
        assert set(page["sources"]) <= {"data:image/p", "data:image/j", "data:image/"}
        assert len(page["ids"]) == len(set(page["ids"]))
        assert page["links"]
        assert {link.removeprefix("#") for link in page["links"]} <= set(page["ids"])
        assert "<script>top.ran.push(1)</script>" in page["text"]
        assert "\u202e" not in page["text"]
        assert page["wide"] <= PHONE
        assert page["beyond"] == []  # tables that one would have to scroll, and would not know
        assert max(map(int, page["paper"][4:-1].split(","))) < 64 < 200 < min(map(int, page["ink"][4:-1].split(",")))
    groups = told["pages"][0]["groups"]
    assert [len(group) for group in groups] == [
        3,
        3,
        3,
        3,
    ]  # words of two answers, views of curves and of scores on the way
    for group in groups:
        for place, panes in enumerate(group):
            assert panes
            assert all(shown == [pressed] == [place] for pressed, shown in panes)


def test_by_day_pages_are_light(tmp_path):
    render_run_page(tmp_path / "run.html", run_page())
    (page,) = look_at([(tmp_path / "run.html").read_text()], tmp_path)["pages"]
    assert min(map(int, page["paper"][4:-1].split(","))) > 200
    assert page["title"] == "run"
