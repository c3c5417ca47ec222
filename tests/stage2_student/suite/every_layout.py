"""One folder with a small benchmark of every layout, by the makers of the layouts' own tests."""

from pathlib import Path

import answers_files as answers
import captions_files as captions
import choices_files as choices
import yes_no_files as yes_no


def write_every_layout(folder: Path) -> None:
    """Write each layout's authors' form into a folder of its own."""
    captions.sugarcrepe(folder / "sugarcrepe", "json")
    captions.sugarcrepe_pp(folder / "sugarcrepe-pp", "json")
    captions.winoground(folder / "winoground", "json")
    captions.bivlc(folder / "bivlc", "hub")
    captions.valse(folder / "valse", "json")
    captions.aro(folder / "relation", "relation", "json")
    captions.aro(folder / "attribution", "attribution", "json")
    captions.coco_order(folder / "order", "split")
    captions.whats_up_controlled(folder / "whatsup", "a", "json")
    answers.write_vqav2(folder / "vqav2")
    answers.write_okvqa(folder / "okvqa")
    answers.write_textvqa(folder / "textvqa")
    answers.write_vizwiz(folder / "vizwiz")
    answers.write_gqa(folder / "gqa")
    answers.write_docvqa(folder / "docvqa")
    answers.write_chartqa(folder / "chartqa")
    choices.write_table(folder / "mmbench" / "mmbench_dev_en.tsv", choices.mmbench_rows())
    choices.write_table(folder / "mmstar" / "mmstar.parquet", choices.mmstar_rows())
    choices.seedbench(folder / "seedbench")
    choices.ai2d(folder / "ai2d")
    choices.scienceqa(folder / "scienceqa")
    yes_no.write_pope(folder / "pope", "github")
    yes_no.write_mme(folder / "mme", "folders")
    yes_no.write_hallusion(folder / "hallusion", "github")
    yes_no.write_nlvr(folder / "nlvr")
    yes_no.write_nlvr2(folder / "nlvr2", "github")
    yes_no.write_questions(folder / "llava")
