"""Questions that share paragraphs, tokenised for a generator."""

import numpy as np
from tiny_models import byte_tokenizer

from zerotune.squad.generation import encode_questions
from zerotune.squad.prompts import QuestionPrompt
from zerotune.squad.questions import GoldAnswer, Paragraph, Question

PLAIN = QuestionPrompt()
CONTEXTS = ["The tower at Hook Head was built of stone in the 13th century.", "A red lamp.", "Nobody asks much here."]
ASKED = [  # paragraph, question, its answer in the paragraph
    (0, "When was it built?", "in the 13th century"),
    (1, "What is red?", "lamp"),
    (0, "Who built it?", None),
    (0, "Of what?", "stone"),
    (2, "Who asks?", "Nobody"),
    (1, "What is blue?", None),
]


def make_questions(asked=ASKED, contexts=CONTEXTS):
    paragraphs = [Paragraph("article", number, context) for number, context in enumerate(contexts)]
    questions = []
    for number, (place, text, answer) in enumerate(asked):
        golds = (GoldAnswer(answer, contexts[place].index(answer)),) if answer else ()
        questions.append(Question(f"q-{number}", text, paragraphs[place], golds))
    return questions


ALL = np.arange(len(ASKED))
TOKENIZER = byte_tokenizer()
DATA = encode_questions(TOKENIZER, PLAIN, make_questions(), 400, 512)
