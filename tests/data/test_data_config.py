from __future__ import annotations

from jsonargparse import ArgumentParser

from hpc_oialr.data import DataConfig, FashionMNIST, FlipAndCrop, TextFolder, TimeSeriesCSV


def parse(*arguments: str) -> tuple[DataConfig, str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig)
    parsed = parser.parse_args([*arguments])
    config = parser.instantiate(parsed).data
    assert isinstance(config, DataConfig)
    return config, parser.dump(parsed)


def test_configs_come_from_the_command_line() -> None:
    config, text = parse("--data=FashionMNIST", "--data.validation=5000", "--data.augment.flip=true", "--data.limit=10")
    assert config == FashionMNIST(validation=5000, augment=FlipAndCrop(flip=True), limit=10)
    assert "class_path: hpc_oialr.data.FashionMNIST" in text
    config, _ = parse("--data=TextFolder", "--data.patterns=['*.c','*.h']", "--data.sequence_length=64")
    assert config == TextFolder(patterns=("*.c", "*.h"), sequence_length=64)
    config, _ = parse("--data=TimeSeriesCSV", "--data.columns=[a,b]", "--data.timestamp_column=date")
    assert config == TimeSeriesCSV(columns=("a", "b"), timestamp_column="date")
