"""TFDS datasets made on this machine: no download, no TensorFlow, prepared once and then shared by all processes."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import extractor

from attn_zoo.spec import UserError

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
    with _quiet():
        return _prepare_once(lambda: builder_class(config=config, data_dir=data_dir, file_format="array_record"), data_dir)


def fetch(make: Callable[[], tfds.core.DatasetBuilder], data_dir: str, allow_download: bool) -> tfds.core.DatasetBuilder:
    """The builder that `make` makes, of a dataset of others, with its data on disk.

    Raises UserError before anything is downloaded, unless that is allowed.
    """
    with _quiet():
        builder = make()
    if builder.is_prepared():
        return builder
    if not allow_download:
        whole = sum(url.size for url in (builder.url_infos or {}).values())  # TFDS keeps the sizes of all configurations together
        size = f"{builder.info.download_size}" if builder.info.download_size else f"at most {tfds.core.utils.Size(whole)}" if whole else "of unknown size"
        raise UserError(f"{builder.info.full_name} is not in data_dir={data_dir!r}; it would be downloaded ({size}), which --allow_download permits")
    tfds.enable_progress_bar()  # gigabytes take a while
    with _extraction_without_tensorflow():
        return _prepare_once(make, data_dir)


def _prepare_once(make: Callable[[], Any], data_dir: str) -> Any:
    builder = make()
    if not builder.is_prepared():  # TFDS renames a finished dataset into place, so what exists is whole
        os.makedirs(data_dir, exist_ok=True)
        with filelock.FileLock(os.path.join(data_dir, f".{builder.info.full_name.replace('/', '-')}.lock")):
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


def cached_bytes(builder: tfds.core.DatasetBuilder, name: str, compute: Callable[[], bytes]) -> bytes:
    """The same for a file of any format; `name` has its ending."""
    path = Path(builder.data_path) / name
    if not path.exists():
        content = compute()
        _write(path, lambda f: f.write(content))
    return path.read_bytes()


def cached_json(builder: Builder, name: str, compute: Callable[[], Any]) -> Any:
    """The same for small JSON content."""
    return json.loads(cached_bytes(builder, f"{name}.json", lambda: json.dumps(compute(), indent=1).encode()))


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
def _extraction_without_tensorflow():
    """TFDS unpacks archives with the standard library, but opens files by TensorFlow's GFile: here by `open`."""
    of = types.SimpleNamespace
    original, extractor.tf = extractor.tf, of(compat=of(as_text=os.fspath), io=of(gfile=of(GFile=open)))
    try:
        yield
    finally:
        extractor.tf = original


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
