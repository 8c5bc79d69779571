"""A pytree of arrays in a folder, through Orbax: started in the background, read back onto any mesh.

Everything known about Orbax is in this file. Each top-level entry of the tree has its own folder, so that one of
them (the parameters, say) is read without the others.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

_HOURS = 3600
_SHOWN = 8


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname  # what it logs as errors, it also raises


logging.getLogger("absl").addFilter(_not_from_orbax)


def describe(tree: Any) -> dict[str, list[Any]]:
    """Path to `[dtype, shape]` of every leaf, as JSON; the dtype of PRNG keys is like `key<threefry2x32>`."""
    return {"/".join(path): _describe(leaf) for path, leaf in _flatten(tree).items()}


def required_bytes(state: Any) -> int:
    """Bytes on disk that a checkpoint of `state` (arrays or their shapes) takes, its metadata included."""
    leaves = [_stored_shape(leaf) for leaf in jax.tree.leaves(state)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 4096 * len(leaves) + 65536


def start(folder: Path, state: Any) -> Callable[[], None]:
    """Copy `state` to the host and start to write it to `folder`, which must not exist; call the result to wait.

    `state` may be donated or changed as soon as this returns. Raises ValueError for a leaf that is no array.
    """
    tree: dict[str, Any] = {}
    for path, leaf in _flatten(state).items():
        stored = _stored(leaf)
        if stored.size:  # Orbax refuses empty arrays; their shape says all
            _put(tree, path, stored)
    with _context():
        return ocp.save_checkpointables_async(str(folder.absolute()), tree).result


def compare(saved: dict[str, list[Any]], target: Any, what: str) -> None:
    """Raise ValueError, naming each leaf, unless `target` has exactly the paths, shapes and dtypes of `saved`."""
    wanted = describe(target)
    differences = {
        "not in the checkpoint": [f"{name} {_show(wanted[name])}" for name in wanted.keys() - saved.keys()],
        "not in the target": [f"{name} {_show(saved[name])}" for name in saved.keys() - wanted.keys()],
        "of another shape or dtype": [
            f"{name} was saved as {_show(saved[name])}, the target is {_show(wanted[name])}"
            for name in saved.keys() & wanted.keys()
            if saved[name] != wanted[name]
        ],
    }
    lines = [f"  {len(names)} {kind}: {_first(names)}" for kind, names in differences.items() if names]
    if lines:
        raise ValueError(
            f"{what} can be restored only into a tree of the same paths, shapes and dtypes, but of the leaves\n"
            + "\n".join(lines)
            + "\nBuild the target from the configuration of the run that saved it (it is in `extra`)."
        )


def load(folder: Path, target: Any) -> Any:
    """The arrays that were saved at the paths of `target`, with its structure and shardings.

    A leaf of `target` without a sharding comes back uncommitted on the default device, so it may meet any mesh.
    """
    leaves = _flatten(target)
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if leaf.size:
            sharding = _sharding(leaf) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            _put(tree, path, _stored_shape(leaf).update(sharding=sharding))
    with _context():
        loaded = ocp.load_checkpointables(str(folder.absolute()), tree) if tree else {}
    restored = [_restored(_get(loaded, path) if leaf.size else None, leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), restored)


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained weights shrink by a tenth, for many times the CPU time
    context.async_options.timeout_secs = 24 * _HOURS
    return context


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = {}
    seen = set()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if not path or not re.fullmatch(r"\w[\w-]*", path[0]):
            raise ValueError(
                "the top level of what is saved must have names made of letters, digits, _ and -, "
                f"got {'/'.join(path) or 'a bare leaf'!r}"
            )
        name = ".".join(path).replace("/", ".")
        if name in seen:
            raise ValueError(f"leaves must have different names, got {'/'.join(path)!r} twice (a dot counts as a /)")
        seen.add(name)
        leaves[path] = leaf
    return leaves


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1] or path:
        tree = tree.setdefault(key, {})
    tree[path[-1] if len(path) > 1 else "value"] = leaf


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path if len(path) > 1 else (*path, "value"):
        tree = tree[key]
    return tree


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    sharding = getattr(leaf, "sharding", None)
    return None if isinstance(leaf, jax.Array) and not leaf.committed else sharding


def _checked(leaf: Any) -> Any:
    """An array or its shape, with a dtype that jax keeps; Python's numbers become what jax makes of them."""
    if isinstance(leaf, bool | int | float):
        return jnp.asarray(leaf)
    kind = type(leaf).__name__
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        if not isinstance(leaf, np.ndarray | np.generic) or jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype:
            return leaf
        kind = f"numpy {leaf.dtype}"
    raise ValueError(
        f"the leaves of a checkpoint must be jax arrays, or numpy arrays of a dtype that jax keeps, got {kind}: "
        "convert it with jnp.asarray, or put it in `extra`"
    )


def _stored(leaf: Any) -> Any:
    """What is written for a leaf: key data for PRNG keys, a copy of what the caller could change in place."""
    leaf = _checked(leaf)
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = _checked(leaf)
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _describe(leaf: Any) -> list[Any]:
    leaf = _checked(leaf)
    return [f"key<{_implementation(leaf)}>" if _is_key(leaf) else str(leaf.dtype), list(leaf.shape)]


def _implementation(keys: Any) -> str:
    """The name of a PRNG, e.g. threefry2x32, also where only the shape of the keys is known."""
    found = []

    def look(keys: jax.Array) -> jax.Array:
        found.append(str(jax.random.key_impl(keys)))
        return keys

    jax.eval_shape(look, keys)
    return found[0]


def _restored(data: Any, target: Any) -> jax.Array:
    sharding = _sharding(target)
    if data is None:
        shape = _stored_shape(target)
        data = jnp.zeros(shape.shape, shape.dtype)
    if sharding is None:
        data = jnp.asarray(np.asarray(data))
    if _is_key(target):
        data = jax.random.wrap_key_data(data, impl=_implementation(target))
    return data if sharding is None else jax.device_put(data, sharding)


def _show(described: list[Any]) -> str:
    dtype, shape = described
    return f"{dtype}[{','.join(map(str, shape))}]"


def _first(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more
