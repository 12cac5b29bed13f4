"""What the files beside a tokenizer.json say of it, read as transformers 5 reads them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gt_jax.data.base import SpecialIds
from gt_jax.data.files import small
from gt_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import AddedToken

STANDARD = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of a token
_OTHER_TEMPLATES = "additional_chat_templates"
_GPT = ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer")  # classes of transformers
# What a class has where tokenizer_config.json is silent.
_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
} | dict.fromkeys(_GPT, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


class NamedTokens(NamedTuple):
    """Tokens that a folder names or adds.

    Attributes:
        added: what the vocabulary of tokenizer.json lacks, in the order in which it gets ids.
        names: name -> text, such as "eos_token" -> "</s>"; chat templates know these names.
    """

    added: "list[AddedToken]"
    names: dict[str, str]


def model_ids(folder: str | Path, vocab_size: int) -> SpecialIds:
    """What config.json and generation_config.json, which comes first, tell of special ids.

    Negative ids mean none.

    Raises:
        InputError: a file is no JSON object, an end-of-text id is no id of the model.
    """
    config = _read_object(Path(folder) / "config.json")
    found = config | _read_object(Path(folder) / "generation_config.json")

    def ids_of(name):
        value = found.get(f"{name}_token_id")
        values = value if isinstance(value, list) else [value]
        for i in values:
            if not (i is None or type(i) is int):
                raise InputError(f"{folder}: {name}_token_id={value!r} must be ids or null")
        return [i for i in values if i is not None and i >= 0]

    ends = ids_of("eos")
    for i in ends:
        if i >= vocab_size:
            raise InputError(
                f"{folder}: eos_token_id={i} must be below the {vocab_size} ids of the model; "
                "correct it in config.json and generation_config.json, or write null"
            )
    first = lambda name: next((i for i in ids_of(name) if i < vocab_size), None)
    return SpecialIds(first("bos"), first("eos"), first("pad"), tuple(ends))


def tokenizer_settings(folder: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, and what the other files say.

    Returns:
        The object of tokenizer_config.json; "special_tokens_map" and "added_tokens", the objects of
        the older files of these names; "chat_template", the template of plain dialogues or None.

    Raises:
        InputError: a file is no JSON object, or a setting is none that transformers takes.
    """
    folder = Path(folder)
    settings = _read_object(folder / "tokenizer_config.json")
    for name in ("special_tokens_map", "added_tokens"):
        settings[name] = _read_object(folder / f"{name}.json")
    fault = lambda said: InputError(f"{folder / 'tokenizer_config.json'}: {said}")
    splits = settings.get("split_special_tokens", False)
    if not isinstance(splits, bool):
        raise fault(f"split_special_tokens={splits!r} must be true or false")
    files = settings.get("fast_tokenizer_files", ["tokenizer.json"])
    if files != ["tokenizer.json"]:
        raise fault(
            f"fast_tokenizer_files={files!r} names other files for other versions of transformers; "
            "keep one as tokenizer.json and remove this field"
        )
    return settings | {"chat_template": _chat_template(folder, settings.get("chat_template"))}


def file_for_class(text: str, settings: Mapping[str, Any]) -> str:
    """tokenizer.json as the class that tokenizer_config.json names reads it.

    The classes of GPT-2 and its kin take `add_prefix_space` from tokenizer_config.json, not from
    tokenizer.json. Normalizers, decoders and all else come from tokenizer.json for every class.
    """
    if _class_name(settings) not in _GPT:
        return text
    content = json.loads(text)
    before = content.get("pre_tokenizer")
    if not isinstance(before, dict) or before.get("type") != "ByteLevel":
        return text
    adds_space = bool(settings.get("add_prefix_space", False))
    if before.get("add_prefix_space", True) == adds_space:
        return text
    content["pre_tokenizer"] = before | {"add_prefix_space": adds_space}
    return json.dumps(content, ensure_ascii=False)


def named_tokens(
    settings: Mapping[str, Any], known: "Mapping[int, AddedToken]", *, byte_level: bool
) -> NamedTokens:
    """The tokens that `tokenizer_settings` found.

    Args:
        settings: what that returned.
        known: the added tokens of tokenizer.json, by id.
        byte_level: whether tokenizer.json writes bytes as letters, as GPT-2 does.

    Raises:
        InputError: a token is described by what is no token.
    """
    try:
        return _named_tokens(_with_defaults(settings, byte_level), known)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"tokenizer_config.json describes no token ({error})") from error


def _named_tokens(settings, known):
    standard = {name: settings[name] for name in STANDARD if name in settings}
    more, extra = _more_tokens(settings)
    if settings.get("added_tokens_decoder") is not None:
        listed = {int(i): _token(dict(t)) for i, t in settings["added_tokens_decoder"].items()}
    else:
        standard, more, extra = _with_older_map(settings, standard, more, extra)
        listed = _older_list(settings["added_tokens"], [*standard.values(), *(extra or [])])
        listed |= known
        if extra is None:
            older = settings["special_tokens_map"].get("additional_special_tokens")
            extra = list(map(_special, older or []))
    # A listed token's properties come before those that its name has.
    by_text = {_text(token): token for token in listed.values()}
    named = {n: by_text.get(_text(t), _token(t)) for n, t in standard.items() if t is not None}
    named = {n: named[n] for n in STANDARD if n in named}  # the order decides on the ids
    named |= {name: _token(token) for name, token in more.items() if token is not None}
    return NamedTokens(
        _to_add(known, listed, named, map(_token, extra or [])),
        {name: _text(token) for name, token in named.items()},
    )


def _to_add(known, listed, named, extra) -> "list[AddedToken]":
    """The tokens that the vocabulary lacks, or has with other properties."""
    written = {repr(token) for token in known.values()}
    added: list = [t for _, t in sorted(listed.items()) if repr(t) not in written]
    texts = set(map(_text, [*known.values(), *added]))
    for token in (*named.values(), *extra):
        if _text(token) not in texts and token not in added:
            added.append(token)
    names = set(map(_text, named.values()))
    return [_added(token, names) for token in added]


def _with_older_map(settings, standard, more, extra):
    """Tokens by standard name, by other names, and without, with those of special_tokens_map.json.

    Its additional_special_tokens count only where nothing else tells of tokens without names.
    """
    of_map = settings["special_tokens_map"]
    standard = standard | {n: _special(t) for n, t in of_map.items() if n in STANDARD}
    more = more | {n: _special(t) for n, t in of_map.items() if _is_name(n) and _is_token(t)}
    found = list(map(_special, of_map.get("extra_special_tokens") or []))
    if found:
        extra = extra or []
        extra = extra + [token for token in found if token not in extra]
    return standard, more, extra


def _more_tokens(settings):
    """Tokens with names that no class knows, as {name: token}, and the list of those without.

    None where neither setting for that list is there.
    """
    extra, older = (settings.get(f"{n}_special_tokens") for n in ("extra", "additional"))
    if not extra:
        extra, older = older or extra, None
    more = {n: t for n, t in settings.items() if _is_name(n) and _is_object(t)}
    texts = {n: t for n, t in settings.items() if _is_name(n) and isinstance(t, str)}
    if isinstance(extra, dict):
        texts, extra = texts | extra, older
    more |= texts or settings.get("model_specific_special_tokens") or {}
    if not isinstance(extra, list | None):
        raise TypeError(f"extra_special_tokens={extra!r}")
    return more, extra


def _older_list(added: Mapping[str, int], named: Iterable) -> "dict[int, AddedToken]":
    """added_tokens.json (token -> id) in the form of added_tokens_decoder."""
    from tokenizers import AddedToken

    # transformers compares with names alone, not with the objects of tokenizer_config.json.
    texts = [_text(token) for token in named if not _is_object(token)]
    flags = {
        token: {"normalized": token not in texts, "special": token in texts} for token in added
    }
    return {int(i): AddedToken(token, **flags[token]) for token, i in added.items()}


def _is_name(key) -> bool:
    return key.endswith("_token") and key not in STANDARD


def _is_object(token) -> bool:
    """Whether this is a token with its properties, as tokenizer_config.json writes them."""
    return isinstance(token, dict) and "__type" in token


def _is_token(token) -> bool:
    return isinstance(token, str | dict)


def _special(token):
    """A token of special_tokens_map.json, whose objects are all special."""
    return _token(token | {"special": True}) if isinstance(token, dict) else token


def _token(token):
    """A token as text or AddedToken, from what JSON holds."""
    from tokenizers import AddedToken

    if isinstance(token, dict):
        fields = {name: token[name] for name in _FIELDS if name in token}
        if not isinstance(fields.get("content"), str):
            raise TypeError(f"{token!r} has no text as its content")
        return AddedToken(**fields)
    if not isinstance(token, str | AddedToken):
        raise TypeError(f"{token!r} is neither text nor an object")
    return token


def _added(token, names) -> "AddedToken":
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or token.content in names
    return token


def _text(token) -> str:
    """The text of a token: a string, an object, or an AddedToken."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else getattr(token, "content", "")


def _class_name(settings) -> str:
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def _with_defaults(settings, byte_level):
    """Settings with the names that the class has by itself."""
    name = _class_name(settings)
    # Llama's class stands in many folders whose tokenizer.json is of GPT-2's kind.
    own = {} if byte_level and name == "LlamaTokenizer" else _DEFAULTS.get(name, {})
    of_map = settings["special_tokens_map"]
    return {n: t for n, t in own.items() if n not in of_map} | dict(settings)


def _chat_template(folder, template) -> str | None:
    """The template of plain dialogues; files come before tokenizer_config.json."""
    if isinstance(template, list):  # of {"name": ..., "template": ...}
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1].get("template") if named else None
    files = {path.stem: path for path in (folder / _OTHER_TEMPLATES).glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files.setdefault("default", folder / "chat_template.jinja")
    if files:  # without a default, none is for plain dialogues
        path = files.get("default")
        template = path and small(path).read_text("utf-8", "replace")
    return template if isinstance(template, str) else None


def _read_object(path) -> dict:
    """The object in a JSON file; {} if there is no file."""
    try:
        content = json.loads(small(path).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON object ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object but a {type(content).__name__}")
    return content
