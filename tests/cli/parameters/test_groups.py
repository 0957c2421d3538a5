"""The help of long commands: options in groups, whole at any width."""

import pytest

pytest.importorskip("typer")

from lora_jax.cli.parameters.groups import ORDER

GROUPS = {
    "train": ["Model", "Data", "Adapter", "Optimization", "Evaluation", "Output"],
    "sweep": ["Model", "Data", "Adapter", "Optimization", "Evaluation", "Output"],
    "generate": ["Model", "Data", "Adapter", "Sampling"],
    "merge": ["Model", "Adapter", "Output"],
}
#: An option -> the group that it is in.
WHERE = {"--model": "Model", "--data": "Data", "--rank": "Adapter", "--lr": "Optimization"}
WHERE |= {"--eval-split": "Evaluation", "--out": "Output", "--mesh": "Devices and memory"}
WHERE |= {"--temperature": "Sampling", "--help": "Others", "--config": "Output"}


def lists(out):
    """Return the options of each list of a help, by its title."""
    found, title = {}, None
    for line in out.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            title = line[:-1]
        elif line.startswith("  -") and title:
            name = next(word for word in line.replace(",", "").split() if word[:2] == "--")
            found.setdefault(title, []).append(name)
    return found


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", GROUPS)
def test_long_commands_list_their_options_in_groups(command, columns, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run(command, "--help").out
    found = lists(out)
    assert [title for title in found if title in ORDER] == [t for t in ORDER if t in found]
    assert set(GROUPS[command]) <= set(found) and found["Others"] == ["--help"]
    for option, group in WHERE.items():
        there = [title for title, names in found.items() if option in names]
        assert there in ([group], [])
    body = out.partition("Examples:")[0].splitlines()
    assert max(map(len, body)) <= columns and max(map(len, body)) > columns - 25
    starts = {len(line) - len(line.lstrip()) for line in body if line[:4] == "    "}
    assert len(starts) == 1  # all texts begin in one column


def test_short_commands_have_one_list(run):
    assert [*lists(run("inspect", "--help").out)] == ["Options"]
