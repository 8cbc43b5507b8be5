"""How a model is evaluated on SQuAD's questions."""

from dataclasses import asdict, dataclass

from zerotune.settings.groups import ModelSettings


@dataclass(frozen=True)
class QuestionOptions:
    """How a checkpoint that answers SQuAD's questions is evaluated.

    Attributes:
        max_length: most tokens of a window or of a prompt with its answer; None, here and below: what the model folder
            says, else the defaults of squad_arguments.
        doc_stride, max_answer_length, n_best: of a span head's windows and answers.
        prompt_format, shots, max_new_tokens: of a model that writes its answers; shots are SolvedQuestions.
        seed: of a head that is not trained, and of bootstraps.
        data_sha256: tells the source of the questions from others, whose ids may be the same.
    """

    model: str
    revision: str | None
    attention: str
    precision: str
    tokens_per_device: int
    load_4bit: bool = False
    max_length: int | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None
    n_best: int | None = None
    prompt_format: str = "auto"
    shots: tuple = ()
    max_new_tokens: int | None = None
    seed: int = 0
    data_sha256: str | None = None

    def described(self) -> dict:
        """Return the settings as metrics.json has them."""
        described = asdict(self) | {"shots": len(self.shots), "dtype": self.precision}
        del described["precision"]  # the name of a score there
        return described

    @property
    def model_settings(self) -> ModelSettings:
        """How the model is loaded."""
        method = "qlora" if self.load_4bit else "full"
        return ModelSettings(self.model, self.revision, method, attention=self.attention, precision=self.precision)
