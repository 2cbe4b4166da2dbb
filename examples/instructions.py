"""Instruction tuning: two teams with answers of their own, a causal model, LoRA or all weights.

The loss counts the answers' tokens alone. Both teams first train alone, and their adapters are
added, integer by integer; then they train together, and the merged model generates.

    python -m examples.instructions
    python -m examples.instructions --model FOLDER --rounds 4 --adapter none
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorand

MODEL = "HuggingFaceTB/SmolLM2-135M"
KITCHEN = [
    ("How long do eggs boil?", "Eight minutes, then cold water."),
    ("How much salt for pasta?", "Ten grams a litre of water."),
    ("How is rice kept loose?", "Rinse it until the water is clear."),
    ("When is bread done?", "When it sounds hollow from below."),
]
GARDEN = [
    ("When are roses cut?", "In spring, above an outer bud."),
    ("How often is moss watered?", "Only when it feels dry."),
    ("Where do ferns grow?", "In the shade, on damp soil."),
    ("When are bulbs planted?", "In autumn, before the frost."),
]
RUN = """
[run]
name = "{name}"
rounds = {rounds}
[model]
name = "{model}"
trainable = "last:2"
adapter = "{adapter}"
max_length = 48
[task]
kind = "causal-lm"
template = "Question: {{text}}\\nAnswer: "
[estimator]
kind = "backprop"
batch_size = 4
[optimizer]
kind = "adam"
learning_rate = 0.001
[rounds]
quorum = {teams}
start_with = {teams}
"""


def main(arguments: Sequence[str] | None = None) -> lorand.Simulation:
    """Train alone and add, train together, merge and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="a name on the hub, or a folder")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--adapter", choices=("none", "lora", "randlora"), default="none")
    options = parser.parse_args(arguments)

    def train(name: str, *teams: list[tuple[str, str]]) -> lorand.Simulation:
        settings = {"model": options.model, "rounds": options.rounds, "adapter": options.adapter}
        run = RUN.format(name=name, teams=len(teams), **settings)
        made = lorand.simulate(run, teams, test=KITCHEN + GARDEN)
        assert made.score is not None
        print(f"{name}: loss {made.score.loss:.3f} on the answers of both teams")
        return made

    # 1. Alone, and added: both adapters are integers on one pool of directions.
    alone = [train("kitchen", KITCHEN), train("garden", GARDEN)]
    both = lorand.add_weighted([made.adapter for made in alone], [1, 1])
    print(f"added: {len(both.coefficients):,} integers, of {both.head.hex()[:16]}")

    # 2. Together.
    together = train("together", KITCHEN, GARDEN)

    # 3. The whole model, as transformers opens it.
    with tempfile.TemporaryDirectory() as folder:
        together.save(folder, merged=True, about_data="8 questions of two teams")
        merged = Path(folder) / "merged"
        model = AutoModelForCausalLM.from_pretrained(merged)
        tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = f"Question: {KITCHEN[0][0]}\nAnswer: "
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    print(tokenizer.decode(answer[0], skip_special_tokens=True))
    return together


if __name__ == "__main__":
    main()
