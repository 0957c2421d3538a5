"""`lora-jax sweep` on a random model of a hundred thousand parameters."""

from lora_jax.training import log

SMALL = ("--length", 32, "--batch", 2, "--targets", "q_proj,v_proj")


def words(data, out, *more, command="sweep"):
    given = [command, "--model", "tiny", "--data", data, "--out", out, *SMALL, *more]
    return [str(word) for word in given]


def records_of(out):
    """The log, without what differs between two runs of the same steps."""
    return [log.without_speed(record) for record in log.read(out / "log.jsonl")]


def of_run(out, name, key="loss"):
    return [r[key] for r in log.read(out / "log.jsonl") if r.get("run") == name and key in r]
