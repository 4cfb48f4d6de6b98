"""What the files beside a tokenizer say: named and added tokens, flags, the chat template.

They are read as transformers reads them. `tokenizer_config.json` names tokens ("eos_token"), each a
string or an object with its content. A few flags have names of the same form ("add_bos_token").
Older folders have `special_tokens_map.json` and `added_tokens.json`: they count where
`tokenizer_config.json` has no `added_tokens_decoder`.
"""

import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken

from weights.folder import check, find, plain, read_optional, shown, text_of

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MOST_ID = 2**24
CONTROL = re.compile(r"\s*[^\w\s▁].*\w", re.DOTALL)  # begins with a mark, and has a letter: <s>
PARTS = ("special", "lstrip", "rstrip", "single_word", "normalized")  # of a token as an object
ALWAYS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
LISTS = ("additional_special_tokens", "extra_special_tokens")


class TokenSettings(NamedTuple):
    named: dict  # "eos_token" -> its AddedToken
    others: list  # the special tokens without a name of their own
    added: dict  # id -> AddedToken
    flags: dict  # "add_bos_token" and "add_eos_token", as far as they are there: true or false
    template: str | dict | None  # several by name, if none of them is the default

    @property
    def special(self) -> list[AddedToken]:
        """Those that the settings name. The unknown token is none: it stands for any text."""
        named = (token for name, token in self.named.items() if name != "unk_token")
        return [*named, *self.others]

    def special_in(self, id_of) -> list[AddedToken]:
        """Those of a vocabulary that are not added to it. A word or a full stop is none, though
        some folders name one for padding: it stands in texts."""
        added = {token.content for token in self.added.values()}
        return [token for token in self.special if CONTROL.match(token.content)
                and token.content not in added and id_of(token.content) is not None]


def read_settings(folder: Path) -> TokenSettings:
    """ValueError names the file and the value that cannot be meant."""
    config = read_optional(folder, CONFIG)
    old = {} if "added_tokens_decoder" in config else read_optional(folder, MAP)
    named = named_tokens(config, CONFIG) | named_tokens(old, MAP)
    others = other_tokens(config, CONFIG) + other_tokens(old, MAP)
    flags = {key: config[key] for key in ("add_bos_token", "add_eos_token")
             if config.get(key) is not None}
    check(flags, dict.fromkeys(flags, bool), CONFIG)
    return TokenSettings(named, others, added_tokens(folder, config), flags,
                         chat_template(folder, config))


def named_tokens(values: dict, where: str) -> dict:
    """Those under keys like `eos_token`. Other keys that end so are flags."""
    flags = {key for key, value in values.items() if isinstance(value, bool)} - {*ALWAYS}
    tokens = {key: value for key, value in values.items()
              if key.endswith("_token") and key not in flags and value != ""}
    extra = values.get("extra_special_tokens")  # by name, or a list
    tokens |= extra if isinstance(extra, dict) else {}
    return {key: token(value, key, where) for key, value in tokens.items() if value is not None}


def other_tokens(values: dict, where: str) -> list[AddedToken]:
    """Those in lists, without a name."""
    return [token(value, key, where) for key in LISTS if isinstance(values.get(key), list)
            for value in values[key] if value is not None]


def added_tokens(folder: Path, config: dict) -> dict:
    """Those that do not come from the vocabulary: id -> token."""
    check(config, {"added_tokens_decoder": dict}, CONFIG)
    by_id = config.get("added_tokens_decoder")
    if by_id is None:
        ids = read_optional(folder, ADDED)
        check(ids, dict.fromkeys(ids, (0, MOST_ID)), ADDED)
        return {index: token(text, text, ADDED, special=False) for text, index in ids.items()
                if index is not None}
    if wrong := next((key for key in by_id if not is_id(key)), None):
        raise ValueError(f"{CONFIG}: added_tokens_decoder has {shown(wrong)}, which is no token id")
    return {int(key): token(value, f"added token {key}", CONFIG, special=False)
            for key, value in by_id.items()}


def is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= 8 and int(key) <= MOST_ID


def token(value, name: str, where: str, special: bool = True) -> AddedToken:
    """A token that is a string, or an object with its content. One that is named is special."""
    parts = value if isinstance(value, dict) else {"content": value}
    content = parts.get("content")
    if not isinstance(content, str):
        found = shown(value if content is None else content)
        raise ValueError(f"{where}: {plain(name)} is {found}, must be a string")
    check(parts, dict.fromkeys(PARTS, bool), f"{where}: {plain(name)}")
    given = {part: parts[part] for part in PARTS if parts.get(part) is not None}
    special = special or given.pop("special", False)
    return AddedToken(content, **{"normalized": not special} | given | {"special": special})


def chat_template(folder: Path, config: dict) -> str | dict | None:
    """The template; of several by name the default, or all of them if there is none."""
    if path := find(folder, "chat_template.jinja"):
        return text_of(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = [item for item in template if item is not None]
        for item in template:
            check({"chat_template": item}, {"chat_template": dict}, CONFIG)
            check(item, {"name": str, "template": str}, f"{CONFIG}: chat_template")
        template = {item.get("name") or "": item.get("template") for item in template}
    if not isinstance(template, dict):
        template = {"chat_template": template}
        check(template, {"chat_template": str}, CONFIG)
        return template["chat_template"]
    check(template, dict.fromkeys(template, str), f"{CONFIG}: chat_template")
    return template.get("default") or template or None
