"""The doctor says what is true of this machine."""

from importlib import metadata

import pytest
import torch

from hippodrome import doctor
from hippodrome.ops._op import use_backend
from hippodrome.part import BadInput


def test_every_op_has_an_example_whose_choice_is_explained():
    report = doctor.examine()
    assert {choice.op for choice in report.choices if choice.device == "cpu"} == set(doctor.ops())
    for choice in report.choices:
        assert choice.reasons.keys() == set(doctor.find_op(choice.op).backends)
        assert choice.reasons[choice.backend] == "ok"
        before = list(choice.reasons)[: list(choice.reasons).index(choice.backend)]
        assert all(choice.reasons[name] != "ok" for name in before), "a better backend was passed over without a reason"


@pytest.mark.parametrize("name", doctor.ops())
def test_examples_are_calls_that_run(name):
    _, args, kwargs = doctor.example(name, "cpu")

    def small(value):
        return value[tuple(slice(0, 8) for _ in value.shape)].zero_() if isinstance(value, torch.Tensor) else value

    with use_backend("reference"):
        doctor.find_op(name)(*map(small, args), **{key: small(value) for key, value in kwargs.items()})


def test_packages_are_those_installed():
    packages = {package.name: package for package in doctor.examine().packages}
    assert packages["torch"].version == metadata.version("torch")
    for package in packages.values():
        if package.version is None:
            with pytest.raises(metadata.PackageNotFoundError):
                metadata.version(package.name)
    assert doctor.examine().missing == []


def test_what_is_needed_is_what_the_package_declares():
    requires = metadata.requires("hippodrome") if _installed() else None
    if requires is None:
        pytest.skip("run from a source tree that is not installed")
    plain = {line.partition(">")[0].strip() for line in requires if "extra" not in line}
    assert plain == set(doctor.NEEDED)


def _installed() -> bool:
    try:
        metadata.version("hippodrome")
    except metadata.PackageNotFoundError:
        return False
    return True


def test_an_absent_package_is_said_to_be_missing(monkeypatch, capsys):
    def version(name: str) -> str:
        if name == "tyro":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    report = doctor.examine()
    assert report.missing == ["tyro"]
    doctor.show(report)
    assert "missing: tyro" in capsys.readouterr().out


def test_the_tables_hold_every_op_and_reason(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    report = doctor.examine()
    doctor.show(report)
    said = capsys.readouterr().out
    for choice in report.choices:
        assert choice.op in said
        assert choice.call in said
        assert all(reason in said for reason in choice.reasons.values() if reason != "ok")
    assert f"{torch.get_num_threads()} threads" in said


def test_an_op_without_an_example_is_named():
    with pytest.raises(BadInput, match="did you mean 'long_conv'"):
        doctor.example("longconv", "cpu")
