"""Trained parameters that a sweep was told to keep (`keep_parameters`): one .npz a cell, a flat dict of arrays by path, written whole or not at all."""

import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_zoo.spec import UserError

Pure = dict[Any, Any]  # a nested dict of arrays, as nnx.to_pure_dict makes it


def parameters_path(workdir: str | os.PathLike, id: str) -> Path:
    """Where the parameters of the cell with this id stand."""
    return Path(workdir) / "parameters" / f"{id}.npz"


def write_parameters(workdir: str | os.PathLike, id: str, params: Pure, rest: Pure) -> Path:
    """Writes what is trained and the rest of a model's variables, replacing an earlier file; a reader sees the old or the new one, never part of it."""
    path = parameters_path(workdir, id)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(x) for name, x in _by_path({"params": params, "rest": rest})}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # the same folder, hence the same file system
    try:
        with open(temporary, "xb") as f:
            np.savez(f, **arrays)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if writing failed
    return path


def load_parameters(workdir: str | os.PathLike, id: str, params: Pure, rest: Pure) -> tuple[Pure, Pure]:
    """(params, rest) as they were written; those given are of the same structure and say which shapes to expect (jax.eval_shape(model.init)).

    Raises UserError naming the file if it is damaged, or of another model.
    """
    path = parameters_path(workdir, id)
    advice = "delete it and run the sweep again with --set keep_parameters=True"
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: cannot be read ({type(e).__name__}); {advice}") from None
    like = {"params": params, "rest": rest}
    expected = {name: x.shape for name, x in _by_path(like)}
    if expected != {name: x.shape for name, x in arrays.items()}:
        raise UserError(f"{path}: holds the parameters of another model; {advice}")
    found = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected])
    return found["params"], found["rest"]


def _by_path(tree: Pure) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in the order of the tree: ('params/blocks/0/mixer/query', ...)."""
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]
