"""Beam search as one writes it with torch.nn.LSTM: the rival of benchmarks/decoding.md.

A batch has a row for each place of each beam, from its first step to its last. A step is one call
of `nn.LSTM`, a log-softmax over all words, and one topk over the extensions of a whole beam; states
follow their hypotheses by `index_select`. The rules are those of `model/beam_search.py`: a beam
narrows by each hypothesis that ends, and one that is full can only end.

Three options take over, one by one, what a careful writer would add.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

EOS_ID = 1


@dataclass(frozen=True)
class Options:
    """What the search does beyond the plain one.

    `stops_early`: a sentence is done when no live hypothesis can overtake its best complete one,
    and not only when its beam is empty. `drops_sentences`: a sentence that is done leaves the
    batch. (`sorts`: batches are made of sentences of about the same length.)
    """

    sorts: bool = False
    stops_early: bool = False
    drops_sentences: bool = False


class LstmTranslator(nn.Module):
    """Encoder, decoder and output layer of torch's own modules."""

    def __init__(self, tensors: dict[str, Tensor], num_layers: int) -> None:
        """Take the weights out of tensors with the names of docs/checkpoints.md."""
        super().__init__()
        source, target = tensors["source_embedding.weight"], tensors["target_embedding.weight"]
        self.source_embedding = nn.Embedding(len(source), source.shape[1], _weight=source)
        self.target_embedding = nn.Embedding(len(target), target.shape[1], _weight=target)
        embedding_size = tensors["target_embedding.weight"].shape[1]
        num_words, hidden_size = tensors["softmax.weight"].shape
        self.encoder = nn.LSTM(embedding_size, hidden_size, num_layers, batch_first=True)
        self.decoder = nn.LSTM(embedding_size, hidden_size, num_layers, batch_first=True)
        self.output = nn.Linear(hidden_size, num_words)
        with torch.no_grad():
            self.output.weight.copy_(tensors["softmax.weight"])
            self.output.bias.copy_(tensors["softmax.bias"])
            for name, network in (("encoder", self.encoder), ("decoder", self.decoder)):
                for layer in range(num_layers):
                    for ours, theirs in (
                        ("weight_ih", "weight_ih"),
                        ("weight_hh", "weight_hh"),
                        ("bias", "bias_ih"),
                    ):
                        weight = getattr(network, f"{theirs}_l{layer}")
                        weight.copy_(tensors[f"{name}.{layer}.{ours}"])
                    getattr(network, f"bias_hh_l{layer}").zero_()

    def encode(self, sources: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Read sentences, given as the encoder reads them; return the states (L, B, H)."""
        lengths = torch.tensor([len(words) for words in sources])
        padded = pad_sequence([torch.tensor(words) for words in sources], batch_first=True)
        packed = pack_padded_sequence(
            self.source_embedding(padded), lengths, batch_first=True, enforce_sorted=False
        )
        state: tuple[Tensor, Tensor] = self.encoder(packed)[1]
        return state

    @torch.inference_mode()
    def translate(
        self, sources: list[list[int]], beam_size: int, max_length: int, options: Options
    ) -> list[tuple[list[int], float]]:
        """Return each sentence's best translation and its log-probability."""
        num_sentences, size = len(sources), beam_size
        hidden, cell = (state.repeat_interleave(size, dim=1) for state in self.encode(sources))
        scores = torch.full((num_sentences, size), -torch.inf)
        scores[:, 0] = 0.0
        tokens = torch.full((num_sentences, size, 1), EOS_ID)
        alive = list(range(num_sentences))
        complete: list[list[tuple[float, list[int]]]] = [[] for _ in sources]
        for length in range(max_length + 1):
            words = self.target_embedding(tokens[:, :, -1].reshape(-1, 1))
            outputs, (hidden, cell) = self.decoder(words, (hidden, cell))
            log_probabilities = self.output(outputs[:, 0]).log_softmax(dim=1)
            if length == max_length:
                ends = log_probabilities[:, EOS_ID].clone()
                log_probabilities.fill_(-torch.inf)
                log_probabilities[:, EOS_ID] = ends
            num_words = log_probabilities.shape[1]
            totals = scores[:, :, None] + log_probabilities.view(len(alive), size, num_words)
            scores, index = totals.view(len(alive), -1).topk(size, dim=1)
            parents, next_words = index // num_words, index % num_words
            tokens = torch.cat(
                [
                    tokens.gather(1, parents[:, :, None].expand(-1, -1, tokens.shape[2])),
                    next_words[:, :, None],
                ],
                dim=2,
            )
            self._finish(alive, scores, tokens, complete, size)
            going_on = self._going_on(alive, scores, complete, options)
            if not going_on.any():
                break
            rows = (torch.arange(len(alive))[:, None] * size + parents).view(-1, size)
            if options.drops_sentences:
                alive = [
                    sentence for sentence, on in zip(alive, going_on.tolist(), strict=True) if on
                ]
                scores, tokens, rows = scores[going_on], tokens[going_on], rows[going_on]
            hidden = hidden.index_select(1, rows.flatten())
            cell = cell.index_select(1, rows.flatten())
        return [
            (max(found, key=lambda pair: pair[0])[1], max(found, key=lambda pair: pair[0])[0])
            for found in complete
        ]

    def _finish(
        self,
        alive: list[int],
        scores: Tensor,
        tokens: Tensor,
        complete: list[list[tuple[float, list[int]]]],
        size: int,
    ) -> None:
        """Put aside what ended, and make the beams narrower by it: other places get no score."""
        widths = torch.tensor([size - len(complete[sentence]) for sentence in alive])
        scores.masked_fill_(torch.arange(size) >= widths[:, None], -torch.inf)
        ends = (tokens[:, :, -1] == EOS_ID) & (scores > -torch.inf)
        for place, rank in ends.nonzero().tolist():
            words = tokens[place, rank, 1:-1].tolist()
            complete[alive[place]].append((float(scores[place, rank]), words))
        scores.masked_fill_(ends, -torch.inf)

    def _going_on(
        self,
        alive: list[int],
        scores: Tensor,
        complete: list[list[tuple[float, list[int]]]],
        options: Options,
    ) -> Tensor:
        best = scores.amax(dim=1)
        going_on = best > -torch.inf
        if options.stops_early:
            bounds = [
                max((score for score, _ in complete[sentence]), default=-torch.inf)
                for sentence in alive
            ]
            going_on &= best > torch.tensor(bounds)
        return going_on
