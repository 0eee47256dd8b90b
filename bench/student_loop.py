"""An optimizer step as a first attempt at a vision-language model makes it.

The picture of every caption is decoded and encoded at every step. Then comes one forward pass for
each token of a caption: patches and the tokens so far go in, the logits at the last position give
the loss of the next token, and nothing is kept from one pass to the next. The end of a caption is
never a target, so such a model does not learn to stop.

The loop that this one is modelled on also fetched every picture over HTTP; the network is left out
here. Captions that have ended are left out of later passes, which a first attempt may not think of.

Letters: B captions that go on, P patches, T tokens so far, H width of the language model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.usual_loop import Features, Sample, finish
from train.model.projector import Projector


def optimizer_step(
    projector: Projector,
    language_model: PreTrainedModel,
    samples: Sequence[Sample],
    features: Features,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Make one optimizer step on some captions.

    Returns:
        Mean cross entropy of the tokens of the captions, their EOS left out.
    """
    optimizer.zero_grad(set_to_none=True)
    patches_BPH = projector(features([sample.image_id for sample in samples]))
    captions = [sample.text.token_ids[:-1] for sample in samples]
    losses = [
        token_losses(patches_BPH, language_model, captions, length)
        for length in range(max(map(len, captions)))
    ]
    loss = torch.cat(losses).mean()
    torch.autograd.backward(loss)
    finish(optimizer)
    return loss.item()


def token_losses(
    patches_BPH: Tensor,
    language_model: PreTrainedModel,
    captions: Sequence[Sequence[int]],
    length: int,
) -> Tensor:
    """Return the loss of the token behind the first `length`, of captions that have one: [B]."""
    rows = [row for row, caption in enumerate(captions) if len(caption) > length]
    ids_BT = torch.tensor([captions[row][: length + 1] for row in rows])
    embeds_BTH = language_model.get_input_embeddings()(ids_BT[:, :-1])
    logits = language_model(
        inputs_embeds=torch.cat([patches_BPH[rows], embeds_BTH], dim=1), use_cache=False
    ).logits
    return nn.functional.cross_entropy(logits[:, -1], ids_BT[:, -1], reduction="none")
