"""TFDS datasets made on this machine: no download, no TensorFlow, prepared once and then shared by all processes."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """A builder's configuration: `options` is whatever its generator reads; `name` must tell any two of them apart."""

    options: Any = None


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A generated dataset. Subclasses give `features` and `generate`, VERSION and RELEASE_NOTES; examples keep their order."""

    def features(self) -> dict[str, Any]:
        """The TFDS feature of each field."""
        raise NotImplementedError

    def probes(self) -> tuple[str, ...]:
        """Names of further splits, beside training, validation and test."""
        return ()

    def generate(self, split: str):
        """Yields the examples of a split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in (*SPLITS, *self.probes())}

    def _generate_examples(self, split: str):
        return enumerate(self.generate(split))


def raw_array(dtype: Any, *shape: int | None) -> tfds.features.Tensor:
    """The feature of an array kept as its raw bytes, not as a list of integers; a None in its shape is free."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def prepare(builder_class: type[Builder], config: Config, data_dir: str) -> Builder:
    """The builder with its data on disk. Processes that ask at the same time wait for the one that prepares."""

    def make() -> Builder:
        return builder_class(config=config, data_dir=data_dir, file_format="array_record")

    with _quiet():
        builder = make()
        if not builder.is_prepared():  # TFDS renames a finished dataset into place, so what exists is whole
            os.makedirs(data_dir, exist_ok=True)
            with filelock.FileLock(os.path.join(data_dir, f".{builder.name}-{config.name}.lock")):
                builder = make()
                builder.download_and_prepare()
    return builder


def describe(builder: Builder) -> dict[str, Any]:
    """What identifies a prepared dataset, for the record."""
    return {
        "dataset": builder.name,
        "version": str(builder.version),
        "config": builder.builder_config.name,
        "num_examples": {name: split.num_examples for name, split in builder.info.splits.items()},
    }


def split_of(key: str) -> str:
    """The split of what has this key, by its hash, 90 / 5 / 5 percent: it stays there when others come or go."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def cached_array(builder: Builder, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array derived from a prepared dataset, computed once, kept beside it and memory-mapped."""
    path = Path(builder.data_path) / f"{name}.npy"
    if not path.exists():
        content = compute()
        _write(path, lambda f: np.save(f, content))
    return np.load(path, mmap_mode="r")


def cached_json(builder: Builder, name: str, compute: Callable[[], Any]) -> Any:
    """The same for small JSON content."""
    path = Path(builder.data_path) / f"{name}.json"
    if not path.exists():
        content = json.dumps(compute(), indent=1).encode()
        _write(path, lambda f: f.write(content))
    return json.loads(path.read_bytes())


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes beside `path` and renames: a reader sees nothing or the whole, whoever else writes it too."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            write(f)
            f.flush()
            os.chmod(f.name, 0o644)  # temporary files are made for their owner alone
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


@contextlib.contextmanager
def _quiet():
    """Without TFDS' bars, its talk of downloads, and its warning that our configurations are not built in."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        log.setLevel(level)
