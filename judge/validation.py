"""What is measured beside training: the validation's figures and, every so often, the probe."""

from data import Corpus
from judge.probe import Probe
from judge.quality import evaluate
from model import Data2VecText

# masked places to fit the probe on, and as many to ask; few, so that it costs seconds
PROBE_PLACES = 10_000


class Validation:
    """The measurements of one run. Called, it returns the figures of the student as it is now."""

    def __init__(self, run, corpus: Corpus, split: str = "valid"):
        """run: a train.Run. Raises InputError if the split cannot be read."""
        self.run = run
        self.corpus = corpus
        self.valid = corpus.split(split)
        self.probe = self.untrained = None

    def __call__(self, with_probe: bool = False) -> dict:
        figures = evaluate(self.run, self.valid, self.corpus.split("train", self.run.epoch))
        if with_probe:
            figures |= self.ask_probe()
        return figures

    def ask_probe(self) -> dict:
        """The probe's accuracy, and its gain and that of counts over the first weights, in nats."""
        if self.probe is None:
            self.probe = Probe(self.run, self.corpus, self.valid.split, PROBE_PLACES)
            self.untrained = self.probe.ask(self.first_student())
        result = self.probe.result(self.untrained, self.probe.ask(self.run.student))
        return dict(
            probe_gain=result["gain"],
            probe_gain_error=result["gain_error"],
            probe_gain_neighbours=result["gain_neighbours"],
            probe_accuracy=result["trained"]["accuracy"],
        )

    def first_student(self) -> Data2VecText:
        """The student before its first update; a resumed run no longer has it."""
        device, cfg = self.run.device, self.run.cfg
        state = device.rng_state()
        device.seed(cfg.data.seed)
        student = Data2VecText(cfg.model, len(self.corpus.dictionary)).to(device.torch_device)
        device.set_rng_state(state)
        return student
