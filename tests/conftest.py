"""What all tests share: eight simulated devices, what was compiled before, a folder of data sets, float64."""

import os

# For the processes that tests start, too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "64"  # threads of XLA: where a device waits for the others, it waits in one of them
# Most of the time is compilation, and this takes half off it. `make test-full` sets none: what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import buckets as storage
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what is compiled, for the processes that tests start and for the next run: most of the time goes there."""
    folder = config.cache.mkdir("compiled")
    for program in folder.glob("*-cache"):  # one whose process was killed as it wrote would end all writing
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink(missing_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_compilation_cache_max_size": 2**30,  # bytes; the oldest go
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take minutes first, so that at the end no process works alone."""
    items.sort(key=lambda item: item.path.parent.name not in ("training", "models"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A TFDS folder; an embedded data set is made in it by the first test that opens it."""
    return tmp_path_factory.mktemp("data_sets")


@pytest.fixture(scope="session")
def buckets() -> Iterator[storage.Buckets]:
    """Google Cloud Storage, on this machine, with a bucket `gs://bucket`; for processes that tests start, too."""
    import fsspec

    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip('needs gcsfs: pip install -e ".[cloud]"')
    there = storage.Buckets("bucket")
    with there.served() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # it has looked into the environment before
        yield there


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets arrays be float64, where equality is proven: nothing hides behind rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def workdir(data_dir, tmp_path_factory) -> Path:
    """The folder of a run of two steps, with a name that a careless printer would garble."""
    from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
    from clip_jax.training.loop import train

    path = tmp_path_factory.mktemp("runs") / "a run [v2]"
    config = Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(warmup="1 step"),
        duration="2 steps",
    )
    train(config, path, devices=jax.devices()[:1])
    return path
