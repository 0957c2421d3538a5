"""The groups in which `--help` shows the options of a command, as plain text at any width."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from typer import Option
from typer.core import TyperCommand

#: The groups in the help's order. What has none of them is under the last one.
MODEL, DATA, ADAPTER = "Model", "Data", "Adapter"
OPTIMIZATION, PREFERENCE = "Optimization", "Preference tuning"
EVALUATION, SAMPLING = "Evaluation", "Sampling"
SERVER, OUTPUT, DEVICES, OTHERS = "Server", "Output", "Devices and memory", "Others"
ORDER = (
    *(MODEL, DATA, ADAPTER, OPTIMIZATION, PREFERENCE),
    *(EVALUATION, SAMPLING, SERVER, OUTPUT, DEVICES, OTHERS),
)

_COLUMN = 30  # the widest first column of a list

#: `typer.Option` in one of the groups.
in_model, in_data, in_adapter = (
    partial(Option, rich_help_panel=group) for group in (MODEL, DATA, ADAPTER)
)
in_optimization, in_preference = (
    partial(Option, rich_help_panel=group) for group in (OPTIMIZATION, PREFERENCE)
)
in_evaluation, in_sampling = (
    partial(Option, rich_help_panel=group) for group in (EVALUATION, SAMPLING)
)
in_server, in_output, in_devices = (
    partial(Option, rich_help_panel=group) for group in (SERVER, OUTPUT, DEVICES)
)


class GroupedCommand(TyperCommand):
    """A command whose help has a list for each group, if all of its options are in one.

    The lists are plain text: `rich`, which would draw boxes around them, would break the examples
    below, which must stay lines to copy.
    """

    def format_options(self, context: Any, formatter: Any) -> None:
        """Write the options by group, with one width for the names in all lists."""
        lists = records_by_group(self.get_params(context), context)
        width = min(max(len(name) for records in lists.values() for name, _ in records), _COLUMN)
        for title, records in lists.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in records])


Records = list[tuple[str, str]]  # the names of an option, and what it is


def records_by_group(parameters: Sequence[Any], context: Any) -> dict[str, Records]:
    """Return what the help says about arguments and options, by the titles of its lists."""
    order = ["Arguments", *ORDER]
    found: list[tuple[str, tuple[str, str]]] = []
    for parameter in parameters:
        record = parameter.get_help_record(context)
        is_argument = parameter.param_type_name == "argument"
        group = getattr(parameter, "rich_help_panel", None) or OTHERS
        if record is not None:
            found.append(("Arguments" if is_argument else group, record))
    if sum(group == OTHERS for group, _ in found) > 1:  # more than --help
        found = [("Options" if group in ORDER else group, record) for group, record in found]
        order = ["Arguments", "Options"]
    lists = {title: [record for group, record in found if group == title] for title in order}
    return {title: records for title, records in lists.items() if records}
