"""A data set that is not ours: labels and no captions, as CIFAR-100 has them; and what is said when it is not there."""

import io
import json

import numpy as np
import pytest
import tiny_cifar
from PIL import Image

from clip_jax.data.sources import open_source
from clip_jax.errors import UserError

LABELLED = ("image", "label")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    data_dir = tmp_path_factory.mktemp("cifar")
    tiny_cifar.make(data_dir)
    return str(data_dir)


def test_images_labels_and_ids_are_read_where_there_are_no_captions(made):
    source = open_source("tfds:cifar100:test", data_dir=made, needs=LABELLED)
    assert (len(source), source.classnames) == (tiny_cifar.LENGTH, tiny_cifar.CLASSES)
    records = [source[i] for i in range(len(source))]
    assert sorted(record.id for record in records) == [f"test_{i:05d}" for i in range(tiny_cifar.LENGTH)]
    for record in records:
        number = int(record.id.removeprefix("test_"))
        assert (record.captions, record.label) == ((), tiny_cifar.label_of(number))
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        np.testing.assert_array_equal(Image.open(io.BytesIO(record.image)), pixels)


def test_what_is_needed_and_missing_is_named(made):
    with pytest.raises(UserError, match="'cifar100' has no feature captions; it has: id, image, label, coarse_label"):
        open_source("tfds:cifar100", data_dir=made)
    with pytest.raises(UserError, match="no feature captions and no depth;"):
        open_source("tfds:cifar100", data_dir=made, needs=("captions", "image", "depth"))


def test_a_data_set_that_tfds_knows_and_has_not_prepared_says_how_in_one_line(tmp_path, caplog):
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)  # a preparation that was broken off
    with pytest.raises(UserError, match=r"no data set 'cifar100'; .*tfds\.builder\('cifar100', data_dir=") as error:
        open_source("tfds:cifar100:test", data_dir=str(tmp_path), needs=LABELLED)
    assert "\n" not in str(error.value)
    assert caplog.records == []


def test_a_data_set_in_a_format_without_random_access_is_refused_with_the_way_out(tmp_path):
    tiny_cifar.make(tmp_path)
    info = tmp_path / "cifar100" / "3.0.2" / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"as tfrecord, which cannot be read by index; .*file_format='array_record'"):
        open_source("tfds:cifar100:test", data_dir=str(tmp_path), needs=LABELLED)
