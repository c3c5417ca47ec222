"""YAML and ``--set a.b=c`` into frozen dataclasses, checked with the field's name in every error.

Only command lines, ``extract()`` and ``train()`` see a config; everything below takes flat keyword
arguments. The type hints of the dataclass are the schema: there is no second description to keep in step. Options may
be given in other programs' words (`Word`): they are turned into ours when they are read, and ours are stored.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import logging
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.files.yaml_text import MAX_BYTES, YamlError, parse_yaml
from vlm_distill_cache.common.locations import slips
from vlm_distill_cache.common.printing import CONTROL, SURROGATE, brief, one_line

ConfigT = TypeVar("ConfigT")
logger = logging.getLogger(__name__)
SAYS_NOTHING = object()
"""In the place of a value: what somebody gave is how things are anyway."""

STAGES = ("teacher_cache", "distill")
"""The sections of a file that holds a whole run."""
SHARED = ("data", "images", "cache", "recipe")
"""What stands beside them, for both."""
_REPLAY = "# teacher-cache build --config "  # begins a file of options that a build left
_SCALARS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Word:
    """What a word that may be given as an option means here; the class of a configuration lists them in ``WORDS``.

    Attributes:
        options: The options it stands for, dotted; none: it is refused.
        values: What its values are here; others are refused, unless ``others``. None: they are the same.
        others: Whether values that are not among ``values`` are taken as they are.
        note: What is said about it when it is given; of one that is refused, what to write instead.
    """

    options: tuple[str, ...] = ()
    values: Mapping[Any, Any] | None = None
    others: bool = False
    note: str = ""


SHARED_WORDS: Mapping[str, Word] = {
    **dict.fromkeys(("dataset", "dataset_name"), Word(options=("data",))),
    "dataset_dir": Word(note="write data=FILE or FOLDER for the samples, images=FOLDER for their pictures"),
    "data_path": Word(options=("data",)),
    "image_folder": Word(options=("images",)),
    "max_train_samples": Word(options=("limit",)),
    "dataloader_num_workers": Word(options=("num_workers",)),
    "use_cpu": Word(options=("device",), values={True: "cpu", False: "auto"}),
}
"""Words that mean the same in both stages."""


NOT_HERE: Mapping[str, Word] = {
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "flash_attn", "use_flash_attn", "use_flash_attention_2"),
        Word(
            values=dict.fromkeys((None, False, "auto"), SAYS_NOTHING),
            note="how attention is computed follows from the signals that are asked for; leave it out",
        ),
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        Word(
            values=dict.fromkeys((0.9, 0.999, 1e-8), SAYS_NOTHING),
            note="it is AdamW's own, 0.9, 0.999, 1e-8; leave it out",
        ),
    ),
    "tf32": Word(values=dict.fromkeys((None, False), SAYS_NOTHING), note="write dtype=bfloat16 for faster arithmetic"),
    "packing": Word(
        values=dict.fromkeys((None, False), SAYS_NOTHING), note="each sample is a sequence of its own; leave it out"
    ),
    "eval_batch_size": Word(note="it follows from the batch size of the command; leave it out"),
    **dict.fromkeys(
        ("nproc", "num_proc", "num_processes", "nproc_per_node"),
        Word(
            note="processes are no option of a configuration: `teacher-cache build` and `distill run` have --nproc N, and "
            "torchrun or `accelerate launch` may start `distill train`"
        ),
    ),
}
"""Words of other trainers that neither stage has an option for."""


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """A class's type hints: each option is looked up in them, and they are slow to make."""
    return typing.get_type_hints(cls)


def load_config(
    cls: type[ConfigT], yaml_path: Path | None, overrides: Iterable[str] = (), *, where: str | None = None
) -> ConfigT:
    """Build a config from its defaults, then a YAML file, then ``a.b=c`` overrides, in this order.

    Args:
        cls: A dataclass; its fields may be bool, int, float, str, Literal, any of these or None, tuples of any length, and
            nested dataclasses.
        yaml_path: A YAML mapping, or None for the defaults alone.
        overrides: Dotted keys with YAML values, for example ``optim.lr=1e-4`` or ``phases=[dpt, dft]``.
        where: Where the values come from, for errors; None: the file, or "options" without one.

    Raises:
        ConfigError: For an unreadable file, an unknown key (naming the nearest known one), a value of the
            wrong type (naming its field), a missing required field, or whatever ``cls`` itself refuses.
    """
    if where is None:
        where = "options" if yaml_path is None else str(yaml_path)
    return load_options(cls, read_yaml(yaml_path), overrides, where=where)


def load_options(
    cls: type[ConfigT], values: Mapping[str, Any], overrides: Iterable[str] = (), *, where: str = "options"
) -> ConfigT:
    """As ``load_config``, of nested plain values in place of a file."""
    merged = copy.deepcopy(canonical_values(cls, values, where=where))
    for override in canonical_overrides(cls, overrides):
        _apply_override(merged, override)
    config = config_from_dict(cls, merged, where=where)
    logger.debug("options: %s", json.dumps(config_to_dict(config), default=str))
    return config


def words_of(cls: type) -> Mapping[str, Word]:
    """The words beside its fields' names that a configuration knows."""
    return getattr(cls, "WORDS", {})


def option_names(cls: type, prefix: str = "") -> dict[str, Any]:
    """All options of a configuration, dotted, with their types; those that have options of their own included."""
    names: dict[str, Any] = {}
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        names[f"{prefix}{field.name}"] = hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            names |= option_names(typing.cast("type", hint), f"{prefix}{field.name}.")
    return names


def canonical_values(cls: type, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Nested options in our own words.

    Raises:
        ConfigError: For a word that means nothing here, with what to write instead, or two words for one option.
    """
    renamed: dict[str, Any] = {}
    for key, value in _renamed(cls, _leaves(cls, values), where):
        *above, last = key.split(".")
        node = renamed
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {key} stands beside {part}={brief(str(node))}; give one of the two")
        node[last] = value
    return renamed


def canonical_overrides(cls: type, overrides: Iterable[str]) -> list[str]:
    """Overrides ``a.b=c`` in our own words, what holds for several phases first; errors as of ``canonical_values``."""
    items: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        given, hint = _Given(override, text.strip()), option_names(cls).get(key.strip())
        if equals and dataclasses.is_dataclass(hint) and isinstance(whole := given.parsed(), dict):
            # As the same mapping in a file: options that it does not name stay what they are.
            for inner, value in _leaves(typing.cast("type", hint), whole, f"{key.strip()}."):
                try:
                    text = json.dumps(value)
                except TypeError as error:
                    raise ConfigError(f"--set {override!r}: {inner} is {value!r}; put texts in quotes") from error
                items.append((inner, _Given(f"{inner}={text}", text)))
            continue
        items.append((key.strip(), given))
    return [
        (f"{key}={value.text}" if "=" in value.override else value.override)
        if isinstance(value, _Given)
        else f"{key}={json.dumps(value)}"
        for key, value in _renamed(cls, items, "--set")
    ]


def last_given(overrides: Sequence[str], option: str) -> str:
    """The text of an option among overrides, of which the last one counts; empty if it is not there, or null."""
    for override in reversed(overrides):
        key, _, text = override.partition("=")
        if key.strip() == option:
            return str(_Given(override, text).of(str) or "")
    return ""


def _leaves(cls: type, values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    hints, leaves = _hints(cls), list[tuple[str, Any]]()
    for key, value in values.items():
        inner = hints.get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            leaves += _leaves(typing.cast("type", inner), value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _renamed(cls: type, items: Iterable[tuple[str, Any]], where: str) -> list[tuple[str, Any]]:
    """Options of one source by our names; what holds for several comes first, so that each may say otherwise."""
    wide: list[tuple[str, Any]] = []
    narrow: list[tuple[str, Any]] = []
    spelt: dict[tuple[str, ...], str] = {}
    for key, given in items:
        options, value, note = _meaning(cls, key, given, where)
        if value is SAYS_NOTHING:
            continue
        if (before := spelt.setdefault(options, key)) != key:
            raise ConfigError(f"{where}: {before} and {key} are the same option, {options[-1]}; give one of them")
        if len(options) > 1:  # what cannot be used is named as it was given
            _convert(option_names(cls)[options[0]], value, dataclasses.MISSING, key, where)
        if options != (key,) and (note or len(options) > 1):
            logger.info("%s is taken as %s%s", key, ", ".join(options), note and f": {note}")
        (wide if len(options) > 1 else narrow).extend((option, value) for option in options)
    return wide + narrow


def _meaning(cls: type, key: str, value: Any, where: str, path: str = "") -> tuple[tuple[str, ...], Any, str]:
    """The options that a word stands for, its value for them, and what is to be said about it."""
    head, dot, rest = key.partition(".")
    word, inner = words_of(cls).get(head), _hints(cls).get(head)
    if dot and word is not None and word.options and not dataclasses.is_dataclass(inner):
        raise ConfigError(f"{where}: {path}{key}: {head} has no options of its own; write {path}{head}=VALUE")
    if word is None or (dot and word.options):
        if not (dot and dataclasses.is_dataclass(inner)):
            return (key,), value, ""
        options, value, note = _meaning(typing.cast("type", inner), rest, value, where, f"{path}{head}.")
        return tuple(f"{head}.{option}" for option in options), value, note
    if word.values is None and word.options:
        return word.options, value, word.note
    plain = value.parsed() if isinstance(value, _Given) else value
    if isinstance(plain, list) and len(plain) < 2 and not word.others:
        plain = plain[0] if plain else None
    for known, ours in (word.values or {}).items():
        if plain == known and type(plain) is type(known):
            return word.options, ours, ""
    if word.others:
        return word.options, value, word.note
    switch = all(isinstance(known, bool) for known in word.values or {})
    allowed = ["true", "false"] if switch else [str(ours) for ours in (word.values or {}).values()]
    expected = f"expected {' or '.join(dict.fromkeys(allowed))}; " if word.options else ""
    note = word.note.replace("KEY", key)  # the whole of it, where the note says how to write it
    raise ConfigError(f"{where}: {path}{key}={brief(str(plain))} cannot be taken: {expected}{note}".removesuffix("; "))


def _refuse_unknown(root: type, cls: type, values: Mapping[Any, Any], path: str, where: str) -> None:
    """Refuse options that there are not, with the one that was meant where that can be told."""
    hints = _hints(cls)
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in values.items():
        if key in fields:
            if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
                _refuse_unknown(root, typing.cast("type", hints[key]), value, f"{path}{key}.", where)
            continue
        hint = _meant(root, cls, str(key), path)
        parts = [name for name in fields if dataclasses.is_dataclass(hints[name])]
        if parts and isinstance(value, dict):
            near = slips(str(key), parts)
            hint = f"; did you mean {path}{near[0]}?" if near else f": {', '.join(parts)} have options of their own."
        raise ConfigError(f"{where}: unknown option {path}{key}{hint} Known: {', '.join(fields)}")


def known_names(cls: type, prefix: str = "") -> dict[str, Word | None]:
    """All options of a configuration and the words for them, dotted, with what a word means."""
    names: dict[str, Word | None] = {f"{prefix}{word}": meant for word, meant in words_of(cls).items()}
    for name, hint in typing.get_type_hints(cls).items():
        if name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            names[f"{prefix}{name}"] = None
            if dataclasses.is_dataclass(hint):
                names |= known_names(typing.cast("type", hint), f"{prefix}{name}.")
    return names


def _meant(root: type, cls: type, key: str, path: str) -> str:
    elsewhere = [name for name in option_names(root) if name.rpartition(".")[2] == key]
    if path and key in words_of(root):
        elsewhere = [key]
    if elsewhere == [key]:
        return f"; {key} is no option of {path.rstrip('.')}: write {key}."
    if elsewhere:
        of = " or ".join(name.rpartition(".")[0] for name in elsewhere)
        return f"; {key} belongs to {of}: write {elsewhere[len(elsewhere) // 2]}."
    here = {name: f"{path}{name}" for name in known_names(cls) if "." not in name}
    elsewhere = [name for name in option_names(root) if slips(key, [name.rpartition(".")[2]])]
    near = [here[name] for name in slips(key, here)] or elsewhere[len(elsewhere) // 2 :]
    if not near:
        return "."
    word = known_names(root).get(near[0])
    return f"; did you mean {near[0]}?{'' if word is None or word.options else f' But {word.note}.'}"


def take_paths(config: Any) -> None:
    """Let a frozen configuration's texts be given as paths."""
    for name, value in vars(config).items():
        if isinstance(value, os.PathLike):
            object.__setattr__(config, name, os.fspath(value))


def read_yaml(path: Path | None, *, missing_ok: bool = False) -> dict[str, Any]:
    """Read a YAML mapping of options, at most `MAX_BYTES` (a pipe's too); empty without a path.

    Raises:
        ConfigError: If it cannot be read, or is no mapping.
    """
    if path is None or (missing_ok and not os.path.lexists(path)):
        return {}
    try:
        loaded = parse_yaml(_bounded_text(path, plain=missing_ok))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(loaded).__name__}")
    return loaded or {}


def read_stage(path: Path | None, stage: str) -> dict[str, Any]:
    """As `read_yaml`, of a file that may hold a whole run: the section of a stage, over what both stages share.

    Args:
        stage: One of `STAGES`.

    Raises:
        ConfigError: Also for a section or shared option that there is not.
    """
    values = read_yaml(path)
    if not values.keys() & set(STAGES):
        return values
    for name, section in values.items():
        if name not in (*STAGES, *SHARED):
            near = difflib.get_close_matches(str(name), (*STAGES, *SHARED), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{path}: unknown section {name}; {hint}A file of both stages has the sections {' and '.join(STAGES)}, and "
                f"beside them what both share: {', '.join(SHARED)}. All else belongs into one of the sections"
            )
        if name in STAGES and not isinstance(section, dict | types.NoneType):
            raise ConfigError(f"{path}: section {name} is {brief(repr(section))}; expected a mapping of options")
    return {name: values[name] for name in SHARED if name in values} | (values.get(stage) or {})


def _bounded_text(path: Path, *, plain: bool) -> str:
    if plain and not path.is_file():  # one of ours; a user may name a pipe
        raise YamlError("it is no file; move it away")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES} bytes")
    return content.decode("utf-8")


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], *, where: str = "") -> ConfigT:
    """Build a config from nested plain values; the inverse of ``config_to_dict``."""
    where = where or cls.__name__
    if isinstance(values, dict):
        values = canonical_values(cls, values, where=where)
        _refuse_unknown(cls, cls, values, "", where)
    return typing.cast("ConfigT", _build(cls, values, None, "", where))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return nested dicts, lists and plain scalars: what YAML and JSON can hold."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a config dataclass, got {type(config).__name__}")
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def save_config(config: Any, path: Path) -> None:
    """Write a config as YAML, atomically, so that ``load_config`` gives an equal one."""
    write_bytes_atomic(path, _yaml(config).encode())


def _yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def save_replay(config: Any, folder: str | Path, *, only_anew: bool = False) -> Path | None:
    """Keep the options of a build beside a cache, which may hold nothing else: ``FOLDER.build.yaml``.

    Args:
        config: None removes the file: it is not true any more.
        folder: Of a link, the folder that it leads to; a file beside the link is removed.
        only_anew: Write only where there is one already: it is of what was there before.

    Returns:
        The file; None if it cannot be written there, or another one has that name, which is left as it is.
    """
    path = _replay_beside(os.path.realpath(folder))
    by_link = _replay_beside(os.path.abspath(folder)) if Path(folder).is_symlink() else None  # noqa: PTH100 - not where it leads
    found = [one for one in (path, by_link) if one is not None and one.exists()]
    try:
        if config is not None and path is not None and (found or not only_anew):
            head = f"{_REPLAY}{path.name}; relative paths start from the working directory\n"
            write_bytes_atomic(path, f"{head}{_yaml(config)}".encode())
        else:
            path = None
        for one in found:
            if one != path:
                one.unlink()
    except OSError:
        return None
    return path


def _replay_beside(folder: str) -> Path | None:
    """The file of options beside a folder, which need not be there; None if it is another's, or nobody can tell."""
    path = Path(f"{folder}.build.yaml")
    try:
        return None if path.exists() and not _bounded_text(path, plain=True).startswith(_REPLAY) else path
    except (OSError, UnicodeDecodeError, YamlError):
        return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, for example optim.lr=1e-4")
    node = values
    for part in parts[:-1]:
        child = node.get(part)
        if isinstance(child, _Given):
            child = node[part] = child.parsed()
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {part} is {child!r}, which has no options of its own")
        node = child
    node[parts[-1]] = _Given(override, text)


@dataclasses.dataclass(frozen=True)
class _Given:
    """The value of an override: YAML, but for an option that is a text, which is taken as it stands."""

    override: str
    text: str

    def parsed(self) -> Any:
        try:
            return parse_yaml(self.text)
        except YamlError as error:
            raise ConfigError(f"--set {self.override!r}: the value is not YAML: {error}") from error

    def of(self, hint: Any) -> Any:
        text = self.text.strip()
        if hint in (str, str | None) and text not in ("", "null", "~") and text[:1] + text[-1:] not in ('""', "''"):
            return text
        parsed = self.parsed()
        if typing.get_origin(hint) is tuple and isinstance(parsed, str | int | float) and not isinstance(parsed, bool):
            items = ", ".join(text.replace(",", " ").split())  # as --signals and --phases are given
            return _Given(self.override, f"[{items}]").parsed()
        return parsed


def _build(cls: Any, values: Any, base: Any, path: str, where: str) -> Any:
    """Build one (nested) dataclass; fields not given come from ``base`` if there is one, else defaults."""
    if not isinstance(values, dict):
        name = path.rstrip(".") or cls.__name__
        raise ConfigError(f"{where}: {name} is {brief(repr(values))}; expected a mapping of options")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        default = getattr(base, name) if base is not None else _default(field)
        if name in values:
            arguments[name] = _convert(hints[name], values[name], default, f"{path}{name}", where)
        elif default is dataclasses.MISSING:
            raise ConfigError(f"{where}: option {path}{name} is required and has no default")
        else:
            arguments[name] = default
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {path}{error}" if path else f"{where}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {path.rstrip('.') or cls.__name__}: {error}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert(hint: Any, value: Any, default: Any, path: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Given):
        value = value.of(hint)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise ConfigError(f"{where}: {path} is {value!r}; expected one of {', '.join(map(repr, args))}")
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):  # as the docs have it
            return None
        return _convert(args[0], value, default, path, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: {path} is {value!r}; expected a list, such as [{value}]")
        return tuple(_convert(args[0], item, None, f"{path}[{place}]", where) for place, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        base = default if isinstance(default, typing.cast("type", hint)) else None
        return _build(hint, value, base, f"{path}.", where)
    return _convert_scalar(hint, value, path, where)


def _convert_scalar(hint: Any, value: Any, path: str, where: str) -> Any:
    if isinstance(value, str) and (SURROGATE.search(value) or CONTROL.search(" ".join(value.split()))):
        raise ConfigError(
            f"{where}: {path} is {one_line(value)!r}, which is not UTF-8 or holds characters that do not print; give it another "
            "name"
        )
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where}: {path} is {value!r} ({type(value).__name__}); expected {_SCALARS[hint]}")
