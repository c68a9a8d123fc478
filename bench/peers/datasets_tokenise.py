"""Alpaca rows to ids, labels and packed blocks with ``datasets`` and a tokenizer of transformers.

The way of the recipes: ``load_dataset``, one ``map`` that tokenises the prompt and the whole text of each row and hides
the prompt's labels, one that joins and cuts. The task is a JSON file, named as the only argument; the answer is a line
of JSON. The cache is a new folder each time.
"""

import json
import sys
import time


def main() -> None:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer

    disable_progress_bar()
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    length, processes = task["length"], task["processes"] if task["processes"] > 1 else None
    began = time.perf_counter()

    def words(row):
        head = task["with_input"] if row["input"] else task["without_input"]
        return head.format(instruction=row["instruction"], input=row["input"])

    def tokenise(row):
        prompt = words(row)
        whole = tokenizer(prompt + row["output"] + tokenizer.eos_token, truncation=True, max_length=length)["input_ids"]
        border = len(tokenizer(prompt, truncation=True, max_length=length)["input_ids"])
        return {"input_ids": whole, "labels": [-100] * border + whole[border:]}

    def tokenise_batch(rows):
        parts = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        prompts = [words(row) for row in parts]
        texts = [p + row["output"] + tokenizer.eos_token for p, row in zip(prompts, parts, strict=True)]
        whole = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        borders = map(len, tokenizer(prompts, truncation=True, max_length=length)["input_ids"])
        labels = [[-100] * border + ids[border:] for ids, border in zip(whole, borders, strict=True)]
        return {"input_ids": whole, "labels": labels}

    def pack(rows):
        joined = {name: [value for values in column for value in values] for name, column in rows.items()}
        return {name: [v[i : i + length] for i in range(0, len(v), length)] for name, v in joined.items()}

    data = load_dataset("json", data_files=task["data"], split="train", cache_dir=task["cache"])
    work = tokenise_batch if task["batched"] else tokenise
    rows = data.map(work, batched=task["batched"], remove_columns=data.column_names, num_proc=processes)
    blocks = rows.map(pack, batched=True, num_proc=processes)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "rows": len(rows), "blocks": len(blocks)}))


if __name__ == "__main__":
    main()
