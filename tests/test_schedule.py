import itertools
from data import readers
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset
from data.schedule import TrainingSchedule
from data.transforms import ImageTransform
from tests.test_readers import picture, put, write_shards, write_source


def test_a_mixture_in_the_schedule_goes_on_from_any_turn(tmp_path):
    """Epochs of a mixture have as many rows as its weights say, whatever turn they are taken from and by however many processes."""
    shards = write_shards(tmp_path / "shards" / "train").parent
    folder = write_source(tmp_path / "folder", "ab")
    for name in "ab":
        put(folder / "train" / name, picture(3))
    rows = readers.read(f"{shards}@1.5,{folder}@3", "train")

    def turns(first, count, share=(0, 1)):
        dataset, encode = CaptionDataset(rows, ImageTransform(16)), lambda texts: [[5, 1]] * len(texts)
        schedule = TrainingSchedule(dataset, encode, 3, 2, "1", 4, 40, True, False, 0, BadImageLedger(), share)
        assert schedule.turns_per_epoch == 4
        return [[batch["ids"] for batch in turn] for turn in itertools.islice(schedule.turns(first), count)]

    whole = turns(0, 9)
    assert sum(len(ids) for turn in whole[:4] for ids in turn) == 24
    for first in range(1, 9):
        assert turns(first, 9 - first) == whole[first:]
    dealt = zip(turns(0, 9, (0, 2)), turns(0, 9, (1, 2)), strict=True)
    assert [[*a, *b] for a, b in dealt] == whole
