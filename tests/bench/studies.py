"""What the studies of compare.py run: the methods, and which settings of them at which learning rates."""

import functools
import json
from dataclasses import dataclass

import baselines
import optimizers
import recipes
import sentiment

METRICS = ("grad", "snip", "force", "fisher", "grasp", "synflow", "magnitude", "random")  # taylor is snip
SETTING = ("method", "metric", "scope", "mask", "density", "flags")  # what makes a row of a table

ADAPT = {  # method: what takes the place of scoring and masking
    "lora": baselines.lora,
    "pissa": baselines.pissa,
    "random block": baselines.block,
    "grad moved lines": functools.partial(baselines.moved, lines=True),
    "grad moved entries": functools.partial(baselines.moved, lines=False),
    "grad after a warm-up": baselines.warmed,
    "grad at layers' rates": baselines.relative,
}
ADAPT |= recipes.RECIPES | recipes.OTHERWISE_TRAINED
OPTIMIZERS = {  # method: what takes AdamW's place
    "grad by momentum": optimizers.momentum,
    "random by momentum": optimizers.momentum,
    "magnitude by momentum": optimizers.momentum,
    "grad moved entries by momentum": optimizers.momentum,
    "grad, a moment a layer": optimizers.LayerAdam,
    "random, a moment a layer": optimizers.LayerAdam,
}

RATES = [f"{digit}e{power}" for power in range(-6, 3) for digit in (1, 3)]
# The rate to try first: of a method or metric in this study, in any study, and of all others by study.
START = {"lora": "1e-2", "pissa": "3e-3", "full": "3e-4", "random": "3e-2", "magnitude": "3e-2"}
START |= {"random block": "3e-2", "grad moved lines": "1e-2", "grad moved entries": "1e-2"}
START |= dict.fromkeys(recipes.RECIPES, "3e-2") | {"grad capped": "1e-2"}
START |= {"grad by momentum": "3e-1", "random by momentum": "3e0", "magnitude by momentum": "3e0"}
START |= {"grad moved entries by momentum": "1e0"}
START |= {"grad, a moment a layer": "1e-2", "random, a moment a layer": "3e-2"}
START |= {"prose": "1e-2", "smollm2": "3e-3", "sentiment": "3e-3"}
START |= {("sentiment", name): "1e-2" for name in ("random", "magnitude", "random block", "heavy block")}
START |= {("sentiment", "lora"): "3e-3", ("sentiment", "full"): "1e-4", ("sentiment", "pissa"): "1e-3"}
START |= {("sentiment", name): "3e-4" for name in ("grad", "snip", "fisher", "grasp")}
START |= {("sentiment", name): "1e-3" for name in ("force", "synflow")}


def setting(method, density=0.01, metric=None, scope=None, mask=None, flags=""):
    """A row of the table; flags: more of train.py's, which come after the study's."""
    return dict(zip(SETTING, (method, metric, scope, mask, density, flags)))


def sparse(metric, scope="global", mask="static", density=0.01, flags=""):
    return setting("sparse", density, metric, scope, mask, flags)


def unique(settings):
    return list({json.dumps(one): one for one in settings}.values())


def name_of(chosen):
    """How the tables call a setting."""
    parts = [chosen["method"]]
    if chosen["method"] == "sparse":
        metric = "snip = taylor" if chosen["metric"] == "snip" else chosen["metric"]
        parts = [metric, chosen["scope"], chosen["mask"]]
    return " ".join([*parts, chosen["flags"]]).strip()


@dataclass
class Study:
    """A base, data and budget, and the settings that are compared there, the most urgent first."""

    flags: str  # train.py's
    reference: dict  # LoRA, which the others are compared with
    tuned: list = ()  # settings for all seeds, each at its best rate
    candidates: list = ()  # the same, but those out of the reference's reach only for the first seed
    once: list = ()  # settings for the first seed alone, each at its best rate
    swept: list = ()  # (setting, rates, seeds): each of these seeds at each of these rates
    measure: object = None  # (model, tokenizer) -> what else to measure of a trained model
    seeds: tuple = (0, 1, 2)

    def runs(self):
        """[(setting, its seeds)] of those at their best rates"""
        several = [(chosen, self.seeds) for chosen in unique([*self.tuned, *self.candidates])]
        return several + [(chosen, self.seeds[:1]) for chosen in self.once]


REACH = 0.02  # nats: by how much a candidate may lose to LoRA on the first seed's validation examples
LORA_RANK_1 = 0.005859375  # the density that rank 1 in all layers of the base comes to
HALF = 0.005  # of SmolLM2's linear layers
PROSE = (
    "--device cpu --model base --data prose --batch-size 8 --seq-len 128 --score-examples 64 "
    "--refresh 20 --eval-examples 64 "
)
SENTIMENT = (
    "--device cpu --model smollm2 --data out/sentiment/train.jsonl --batch-size 8 --seq-len 96 "
    "--score-examples 64 --refresh 20 --eval-examples 128 "
)
SWEPT = [sparse("grad"), sparse("random"), setting("lora")]
PAPERS_RATES = ("5e-5", "1e-4", "3e-4", "5e-4")
LONG = [sparse("grad"), sparse("random"), setting("lora"), setting("full", None)]
LONG_PAIRS = {  # study: the settings whose long runs are compared step by step
    "long": (sparse("grad"), setting("lora")),
    "long-sentiment": (sparse("grad", density=HALF), setting("lora", HALF)),
}

STUDIES = {
    "prose": Study(
        PROSE + "--steps 60 --eval-every 1000",
        reference=setting("lora"),
        tuned=unique(
            [sparse("grad"), setting("lora"), setting("full", None), sparse("random"), setting("pissa")]
            + [sparse("grad", density=d) for d in (0.001, 0.003, LORA_RANK_1, 0.03)]
            + [setting("lora", d) for d in (LORA_RANK_1, 0.03, 0.1)]
            + [sparse(metric) for metric in METRICS]
            + [sparse(metric, "local") for metric in METRICS]
            + [sparse("random", density=d) for d in (0.001, 0.003, 0.03)]
            + [setting("grad moved lines"), setting("grad moved entries")]
            + [sparse(metric, "global", "dynamic") for metric in METRICS]
            + [sparse("grad", flags="--steps 240"), sparse("random", flags="--steps 240")]
            + [setting("lora", flags="--steps 240"), setting("grad after a warm-up")]
            + [sparse(metric, "local", "dynamic") for metric in METRICS]
            + [sparse("grad", flags="--score-examples 512"), sparse("grad", flags="--score-examples 8")]
            + [setting("grad at layers' rates"), setting("random block")]
            + [setting(method) for method in OPTIMIZERS]
        ),
        candidates=[setting(method) for method in recipes.RECIPES]
        # at the price of LoRA's step, or below it
        + [setting("random block", d) for d in (0.03, 0.1, 0.2)]
        + [setting("random columns", d) for d in (0.03, 0.1)]
        + [sparse("grad", density=0.1), setting("largest entries of a block", 0.03)],
        swept=[(chosen, ("1e-4", "3e-4", "1e-3"), (0,)) for chosen in SWEPT],
    ),
    # The paper's own rates, for as long as it takes.
    "long": Study(
        PROSE + "--steps 960 --eval-every 60",
        reference=setting("lora"),
        swept=[(chosen, PAPERS_RATES, (0, 1, 2)) for chosen in LONG_PAIRS["long"]]
        + [(chosen, PAPERS_RATES, (0,)) for chosen in LONG],
    ),
    "long-sentiment": Study(
        SENTIMENT + "--steps 960 --eval-every 60",
        reference=setting("lora", HALF),
        swept=[(chosen, ("3e-4", "1e-4"), (0,)) for chosen in LONG_PAIRS["long-sentiment"]],
        measure=sentiment.measure_test,
    ),
    "smollm2": Study(
        "--device cpu --model smollm2 --data gsm --steps 40 --batch-size 4 --seq-len 192 "
        "--score-examples 32 --refresh 20 --eval-every 1000 --eval-examples 16",
        reference=setting("lora", HALF),
        tuned=[sparse("grad", density=HALF), setting("lora", HALF), setting("full", None)]
        + [sparse("random", density=HALF), setting("random block", HALF), sparse("magnitude", density=HALF)],
        once=[sparse(metric, density=HALF) for metric in ("snip", "force", "fisher")]
        + [sparse("grad", "local", density=HALF), sparse("grad", "global", "dynamic", density=HALF)]
        + [setting("pissa", HALF), setting("grad moved entries", HALF), setting("grad moved lines", HALF)],
    ),
    "sentiment": Study(
        SENTIMENT + "--steps 60 --eval-every 1000",
        reference=setting("lora", HALF),
        tuned=[setting("lora", HALF), sparse("random", density=HALF), sparse("grad", density=HALF)]
        + [setting("full", None), setting("random block", HALF), setting("pissa", HALF)]
        + [sparse(metric, density=HALF) for metric in ("magnitude", "synflow", "force")],
        once=[sparse(metric, density=HALF) for metric in ("snip", "fisher", "grasp")]
        + [sparse("grad", "local", density=HALF), sparse("grad", "global", "dynamic", HALF)]
        + [sparse(metric, "local", density=HALF) for metric in METRICS if metric != "grad"]
        + [sparse("grad", "local", "dynamic", HALF), setting("heavy block", HALF)]
        + [setting("random block", 0.1)],  # below the price of LoRA's step
        measure=sentiment.measure_test,
    ),
}
