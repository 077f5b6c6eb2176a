"""How the leaves of a tree are named, stored, checked and put back; nothing here knows Orbax."""

import json
import zlib
from typing import Any

import jax
import numpy as np

from rain_jax.keys import is_key, key_like
from rain_jax.types import PyTree


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their names, `params.Dense_0.kernel`."""
    paths, _ = jax.tree.flatten_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator=".") or "leaf": x for path, x in paths
    }
    if len(found) != len(paths):
        raise ValueError("two leaves have the same name: a key contains a dot")
    return found


def plain(leaf: Any) -> Any:
    """What is stored for a leaf: a typed key's data, a number as an array."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def target(leaf: Any) -> Any:
    """What Orbax is to restore for a leaf, and where."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    home = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=home)


def shaped(like: PyTree, found: dict[str, Any]) -> PyTree:
    """The tree of `like` with what was restored for each of its leaves."""
    leaves = [
        key_like(leaf, found[name]) if is_key(leaf) else found[name]
        for name, leaf in named(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def described(leaf: Any) -> str:
    """Its dtype and shape, `float32[3,4]`."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def checksum(leaf: Any) -> int | None:
    """CRC-32 of the bytes; None for what is split over several hosts."""
    leaf = plain(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A document that tells when it was changed."""
    return {"content": content, "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def unsealed(document: dict[str, Any]) -> dict[str, Any]:
    """What was sealed; `ValueError` where it is not that any more."""
    if sealed(document["content"]) != document:
        raise ValueError("its list of leaves is not as it was written")
    return document["content"]
