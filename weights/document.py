"""`support/document.py` for tests/test_cache.py, which names a model's folder."""

from support import document
from support.document import Document  # noqa: F401
from weights.checkpoint import fingerprint, load_config


def save_document(path, saved, folder, config, dtype):
    identity = document.identity_of(fingerprint(folder), config, dtype)
    document.save_document(path, saved, identity, config.protected_tokens)


def load_document(path, folder, config, device, dtype):
    identity = document.identity_of(fingerprint(folder), config, dtype)
    return document.load_document(path, identity, config.protected_tokens,
                                  load_config(folder).kv_shape, device)
