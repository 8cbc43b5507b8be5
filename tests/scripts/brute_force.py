"""Compute label likelihoods the slow way: plain transformers, float32, one row at a time, no padding, no cache."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ("negative", "positive")
CONTENT_FREE = ("N/A", "[MASK]", "")


def plain_prompt(text, shots=()):
    solved = [f"Review: {shot}\nSentiment: {WORDS[label]}\n\n" for shot, label in shots]
    return "".join(solved) + f"Review: {text}\nSentiment:"


class BruteForce:
    """Computes log p(label word | prompt) for both labels."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def likelihoods(self, prompt: str, answers: list[str], add_special_tokens=True) -> torch.Tensor:
        """Return the sum over each answer's tokens, [len(answers)]."""
        sums = []
        num_prompt = len(self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"])
        for answer in answers:
            ids = self.tokenizer(prompt + answer, add_special_tokens=add_special_tokens)["input_ids"]
            with torch.no_grad():
                logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].float()
            steps = [logits[place - 1].log_softmax(-1)[ids[place]] for place in range(num_prompt, len(ids))]
            sums.append(torch.stack(steps).sum())
        return torch.stack(sums)

    def scores(self, text, shots=(), calibrated=False) -> list[float]:
        """Return the labels' natural log-probabilities after the plain prompt."""
        answers = [f" {word}" for word in WORDS]
        scores = self.likelihoods(plain_prompt(text, shots), answers).log_softmax(-1)
        if calibrated:
            free = [self.likelihoods(plain_prompt(one, shots), answers).softmax(-1) for one in CONTENT_FREE]
            scores = (scores - torch.stack(free).mean(0).log()).log_softmax(-1)
        return scores.tolist()
