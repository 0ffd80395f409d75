"""Checkpoints of one cell: state, data position and curve, saved and found again with Orbax."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints in one directory; the newest two are kept."""

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
        self.manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, step: int, state: Any, batches: Any, curve: dict, seconds: float) -> None:
        """Starts saving; a step that is not whole when the process dies does not count."""
        # JSON keeps every bit of a Python float, so a resumed curve is the same curve.
        meta = {"curve": copy.deepcopy(curve), "seconds": seconds}  # written in the background, while the curve grows
        items = {"state": ocp.args.StandardSave(state), "data": grain.checkpoint.CheckpointSave(batches), "meta": ocp.args.JsonSave(meta)}
        self.manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: Any, batches: Any) -> tuple[Any, dict, float] | None:
        """(state, curve, seconds) of the newest step that can be read, `batches` moved to where it was; None if there is none.

        `state` gives shapes and shardings. A damaged step is reported, deleted and passed over.
        """
        start = batches.get_state()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(self.manager.all_steps(), reverse=True):
            items = {"state": ocp.args.StandardRestore(abstract), "data": grain.checkpoint.CheckpointRestore(batches), "meta": ocp.args.JsonRestore()}
            try:
                found = self.manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as e:  # Orbax, TensorStore and Grain raise what they like at damaged files
                reason = (str(e).splitlines() or [""])[0]
                print(f"checkpoint {self.directory / str(step)} cannot be read ({type(e).__name__}: {reason}); trying an older one", flush=True)
                batches.set_state(start)  # it may have been moved before the failure
                self.manager.delete(step)  # or this step could not be saved again
                continue
            return found["state"], found["meta"]["curve"], found["meta"]["seconds"]
        return None

    def remove(self) -> None:
        """Deletes all of them, once the record stands."""
        self.manager.close()
        shutil.rmtree(self.directory, ignore_errors=True)
