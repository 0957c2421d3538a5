"""Record a `DatasetDict` of Hugging Face's `datasets`, as its `save_to_disk` writes it.

python -m tests.training.rows.record_datasets (datasets 5.2.0)
"""

import json
import pathlib
import shutil

HERE = pathlib.Path(__file__).parent / "recorded" / "dict"
ROWS = {
    "train": [{"question": f"What is {n}?", "answer": f"é{n}", "stars": n % 2} for n in range(7)],
    "validation": [{"question": "Held?", "answer": "out", "stars": 1}],
    "test": [{"question": "Tested?", "answer": None, "stars": 0}],
}


def main():
    import datasets

    shutil.rmtree(HERE, ignore_errors=True)
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("large_string"),
            "stars": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    made = {name: datasets.Dataset.from_list(rows, features) for name, rows in ROWS.items()}
    # rows in another order than in memory, and two files
    made["train"] = made["train"].select([6, 5, 4, 3, 2, 1, 0])
    datasets.DatasetDict(made).save_to_disk(
        HERE, num_shards={"train": 2, "validation": 1, "test": 1}
    )
    (HERE.parent / "version.json").write_text(json.dumps({"datasets": datasets.__version__}) + "\n")


if __name__ == "__main__":
    main()
