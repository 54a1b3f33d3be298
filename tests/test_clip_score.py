"""CLIP scores against a re-computation with open_clip alone, on tiny random models; loading and its errors."""

import gzip
import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from captioner import clip_score, demo
from captioner.clip_score import PROMPT, ClipScorer, embed_split, load_scorer, same_model, score_candidates, score_captions
from captioner.errors import UserError
from data.bad_images import BadImageLedger
from data.rows import FileImage, Row

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
CAPTIONS = ["A dog runs over a lawn.", "two red cars", "a dog runs over a lawn.", ""]
REFERENCES = [["a brown dog outside", "the dog is running", "grass"], ["a red car"], ["a cat"], ["nothing", "an empty room"]]
LONG = "a very long story " * 40


def random_clip(seed: int) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(**TINY).eval()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A small architecture beside the embedded ones."""
    monkeypatch.setitem(demo.CLIPS, "Tiny", TINY)


@pytest.fixture
def weights(tmp_path):
    """Two files under open_clip's names, from different seeds."""
    for seed in (1, 2):
        save_file(random_clip(seed).state_dict(), tmp_path / f"{seed}.safetensors")
    return tmp_path


@pytest.fixture
def scorer(weights) -> ClipScorer:
    return load_scorer(f"Tiny:{weights / '1.safetensors'}", "cpu")


@pytest.fixture
def images(scorer):
    """Embeddings (4, E) of noise."""
    return scorer.embed_images(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def encoded(scorer, monkeypatch):
    """Every row of ids that the text tower encodes from here on."""
    rows = []
    encode_text = scorer.model.encode_text
    monkeypatch.setattr(scorer.model, "encode_text", lambda ids, **options: rows.extend(ids.tolist()) or encode_text(ids, **options))
    return rows


def oracle_texts(texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return normalize(random_clip(1).encode_text(open_clip.tokenize(texts)), dim=-1)


def test_embeddings_are_those_of_open_clip(scorer):
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = normalize(random_clip(1).encode_image(pixel_values), dim=-1)
    torch.testing.assert_close(scorer.embed_images(pixel_values), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scorer.embed_texts(CAPTIONS), oracle_texts(CAPTIONS), atol=1e-6, rtol=0)
    prompted = oracle_texts(["A photo depicts " + text for text in CAPTIONS])
    torch.testing.assert_close(scorer.embed_texts(CAPTIONS, PROMPT), prompted, atol=1e-6, rtol=0)
    assert (prompted - oracle_texts(CAPTIONS)).abs().max() > 1e-3, "the prompt must matter here"


def test_padding_is_left_out_only_where_it_cannot_be_seen(monkeypatch):
    for change in ({"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "eos", "eos_id": 49407}, {}):
        config = {**TINY, "text_cfg": {**TINY["text_cfg"], **change}}
        monkeypatch.setitem(demo.CLIPS, "Other", config)
        scorer = load_scorer("Other", "cpu")
        with torch.no_grad():
            expected = scorer.model.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)
        torch.testing.assert_close(scorer.embed_texts(CAPTIONS), expected, atol=1e-6, rtol=0)


def test_the_transform_is_that_of_open_clip(scorer):
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    expected = open_clip.image_transform(32, is_train=False)(image)
    torch.testing.assert_close(scorer.transform(image), expected, atol=1e-6, rtol=0)


def test_scores_equal_a_plain_recomputation(scorer, images):
    # Images that half the captions point away from, so that clamps are met: cosines of random towers all have one sign.
    images[1] = -scorer.embed_texts(CAPTIONS, PROMPT)[1]
    images[2] = normalize(images[2] + scorer.embed_texts(CAPTIONS)[2], dim=-1)
    corpus, items = score_captions(scorer, images, CAPTIONS, REFERENCES)
    for k, (caption, references) in enumerate(zip(CAPTIONS, REFERENCES)):
        prompted = oracle_texts([PROMPT + text for text in [caption, *references]])
        clip_s = 2.5 * max((images[k] @ prompted[0]).item(), 0)
        reference_s = max(max((prompted[0] @ reference).item() for reference in prompted[1:]), 0)
        harmonic = 0 if clip_s + reference_s == 0 else 2 * clip_s * reference_s / (clip_s + reference_s)
        cosine = (images[k] @ oracle_texts([caption])[0]).item()
        assert items[k] == pytest.approx({"CLIPScore": clip_s, "CLIP_cosine": cosine, "RefCLIPScore": harmonic}, abs=1e-5)
    assert items[1]["CLIPScore"] == 0 == items[1]["RefCLIPScore"] and items[1]["CLIP_cosine"] < 0, "clamped, and not clamped"
    assert len({round(item["CLIPScore"], 4) for item in items}) == 4
    for name in ("CLIPScore", "CLIP_cosine", "RefCLIPScore"):
        assert corpus[name] == pytest.approx(sum(item[name] for item in items) / 4)
    assert corpus["scorer"] == scorer.name and corpus["truncated"] == 0 and len(corpus) == 5


def test_the_best_reference_counts_and_a_negative_one_is_clamped():
    """Embeddings by hand: cosines 0.6 with the image, -1 and 0.8 with the references."""
    vectors = {"c": [1.0, 0.0], "against": [-1.0, 0.0], "near": [0.8, 0.6]}

    class ByHand:
        name, truncated = "by hand", 0

        def embed_texts(self, texts, prompt=""):
            return torch.tensor([vectors[text] for text in texts])

    image = torch.tensor([[0.6, 0.8]])
    assert score_captions(ByHand(), image, ["c"], [["against", "near"]])[1][0]["RefCLIPScore"] == pytest.approx(2 * 1.5 * 0.8 / 2.3)
    assert score_captions(ByHand(), image, ["c"], [["against"]])[1][0]["RefCLIPScore"] == 0


def test_candidates_get_the_scores_of_captions_and_duplicates_are_encoded_once(scorer, images, encoded):
    candidates = [["a dog", "a cat", "a dog"], ["two cars", "a cat", "a cat"]]
    scores = score_candidates(scorer, images[:2], candidates)
    assert len(encoded) == 3 and scores.shape == (2, 3)
    assert scores[0, 0] == scores[0, 2] and scores[1, 1] == scores[1, 2] and scores[0, 1] != scores[1, 1]
    for n in range(3):
        _, items = score_captions(scorer, images[:2], [texts[n] for texts in candidates], [["x"], ["x"]])
        assert [item["CLIPScore"] for item in items] == scores[:, n].tolist()


def test_texts_are_remembered_and_batched(scorer, encoded, monkeypatch):
    monkeypatch.setattr(clip_score, "TEXT_BATCH", 3)
    texts = [f"number {k % 7}" for k in range(20)]
    first = scorer.embed_texts(texts)
    assert len(encoded) == 7 and torch.equal(first[0], first[7])
    assert torch.equal(scorer.embed_texts(texts[::-1]), first.flip(0)) and len(encoded) == 7
    scorer.embed_texts(texts, PROMPT)
    assert len(encoded) == 14, "a prompt makes another text"


def test_long_texts_keep_their_end_token_and_are_counted_once(scorer, images, encoded):
    end = open_clip.tokenizer.SimpleTokenizer().eot_token_id
    fits, over = " ".join(["dog"] * 75), " ".join(["dog"] * 76)  # 77 tokens with start and end; 78
    scorer.embed_texts([fits, "^!" * 37 + "^"])
    assert scorer.truncated == 0
    scorer.embed_texts([over, over, LONG, "!^" * 60])  # the token "!" has the number of the padding
    assert all(row[-1] == end for row in encoded) and scorer.truncated == 3
    corpus, _ = score_captions(scorer, images[:2], [LONG, fits], [[LONG], ["a dog"]])
    assert corpus["truncated"] == 4, "fits does not with the prompt"
    torch.testing.assert_close(scorer.embed_texts([LONG]), oracle_texts([LONG]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pad", ["pad", "end"])
def test_long_texts_of_a_hugging_face_tokenizer(tmp_path, scorer, encoded, pad):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"pad": 0, "dog": 1, "end": 2}, unk_token="dog"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A end", special_tokens=[("end", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="end").save_pretrained(tmp_path)
    scorer.tokenizer = HFTokenizer(str(tmp_path), context_length=77)
    scorer.embed_texts(["dog", " ".join(["dog"] * 76), " ".join(["dog"] * 77), LONG * 2])
    assert scorer.truncated == 2
    assert [row[-1] for row in encoded[1:]] == [2, 2, 2] and encoded[0][:2] == [1, 2]


def test_a_split_is_embedded_once_and_bad_images_are_named(scorer, tiny_data, encoded):
    broken = tiny_data / "train" / "broken.png"
    broken.write_bytes(b"no picture")
    rows = [Row(path.name, FileImage(path)) for path in sorted((tiny_data / "train").glob("*.png"))]
    lines = []
    ledger = BadImageLedger(warn=lines.append)
    embeddings = embed_split(scorer, rows, ledger, 3)
    assert embeddings.keys() == {row.id for row in rows} - {"broken.png"} and len(rows) == 9
    assert len(ledger) == 1 and "broken.png" in lines[0]
    red = scorer.embed_images(scorer.transform(Image.open(tiny_data / "train" / "red.png").convert("RGB"))[None])[0]
    torch.testing.assert_close(embeddings["red.png"], red, atol=1e-6, rtol=0)


def test_random_models_are_the_same_for_a_name_and_leave_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = load_scorer("Tiny", "cpu"), load_scorer("Tiny", "cpu")
    assert same_model(first, second) and first.name == "Tiny" and torch.equal(torch.get_rng_state(), state)


def test_same_model_is_told_by_the_weights(weights):
    save_file(random_clip(1).state_dict(), weights / "copy.safetensors", {"format": "pt"})
    first, copy, other = (load_scorer(f"Tiny:{weights / name}.safetensors", "cpu") for name in ("1", "copy", "2"))
    assert same_model(first, copy) and first.name != copy.name
    assert not same_model(first, other)


def test_an_embedded_tag_and_its_merges(weights, monkeypatch):
    """A vocabulary of its own, and weights kept in bf16."""
    merges = weights / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\nd o\ndo g</w>\nc a"))
    vocabulary = 2 * 256 + 3 + 2
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": vocabulary, "tokenizer_kwargs": {"bpe_path": str(merges)}}}
    model = open_clip.CLIP(**config).eval()
    save_file({key: tensor.bfloat16() for key, tensor in model.state_dict().items()}, weights / "small.safetensors")
    monkeypatch.setitem(demo.CLIPS, "Small", config)
    monkeypatch.setitem(demo.CLIP_WEIGHTS, "Small", {"demo": weights / "small.safetensors"})
    scorer = load_scorer("Small:demo", "cpu")
    assert scorer.tokenizer(["dog"])[0, :3].tolist() == [vocabulary - 2, 512 + 1, vocabulary - 1]
    rounded = model.bfloat16().float()
    ids = open_clip.tokenizer.SimpleTokenizer(bpe_path=str(merges))(["a dog"])
    with torch.no_grad():
        torch.testing.assert_close(scorer.embed_texts(["a dog"]), rounded.encode_text(ids, normalize=True), atol=1e-6, rtol=0)


def test_a_text_tower_of_its_own_module_takes_both_layouts(weights, monkeypatch):
    monkeypatch.setitem(demo.CLIPS, "Custom", {**TINY, "custom_text": True})
    old = load_scorer(f"Custom:{weights / '1.safetensors'}", "cpu")
    assert type(old.model) is open_clip.CustomTextCLIP
    torch.testing.assert_close(old.embed_texts(["a dog"]), oracle_texts(["a dog"]), atol=1e-6, rtol=0)
    save_file(old.model.state_dict(), weights / "new.safetensors")
    assert same_model(old, load_scorer(f"Custom:{weights / 'new.safetensors'}", "cpu"))


def test_preprocessing_comes_with_the_weights(weights):
    (weights / "folder").mkdir()
    save_file(random_clip(1).state_dict(), weights / "folder" / "open_clip_model.safetensors")
    config = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}}
    (weights / "folder" / "open_clip_config.json").write_text(json.dumps(config))
    transform = load_scorer(f"Tiny:{weights / 'folder'}", "cpu").transform
    assert (transform.mean, transform.interpolation, transform.resize_mode, transform.image_size) == ((0.5,) * 3, "bilinear", "squash", 32)


def missing_key(folder):
    state = random_clip(1).state_dict()
    state["strange"] = state.pop("ln_final.bias")
    save_file(state, folder / "wrong.safetensors")
    return f"Tiny:{folder / 'wrong.safetensors'}"


def damaged(folder):
    content = (folder / "1.safetensors").read_bytes()
    (folder / "damaged.safetensors").write_bytes(content[: len(content) // 2])
    return f"Tiny:{folder / 'damaged.safetensors'}"


def pickled(folder):
    torch.save(random_clip(1).state_dict(), folder / "weights.pt")
    return f"Tiny:{folder / 'weights.pt'}"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (missing_key, ["wrong.safetensors", "missing: ln_final.bias", "unexpected: strange"]),
        (damaged, ["damaged.safetensors", "damaged or incomplete"]),
        (pickled, ["weights.pt is a pickle"]),
        (lambda folder: f"Tiny:{folder / 'none.safetensors'}", ["none.safetensors"]),
        (lambda folder: f"ViT-Tiny-Scenes:{folder / '1.safetensors'}", ["1.safetensors does not fit CLIP"]),
        (lambda folder: "ViT-B-33", ["ViT-B-33", "ViT-B-32"]),
        (lambda folder: "Tiny:", ["ends in a colon"]),
        (lambda folder: "Tiny:openai", ["'openai' is neither a file nor a tag of Tiny"]),
        (lambda folder: "timm/vit_tiny_patch16_224", ["timm/vit_tiny_patch16_224 has no text tower"]),
    ],
)
def test_what_cannot_be_loaded_is_one_line(spec, named, weights):
    with pytest.raises(UserError) as error:
        load_scorer(spec(weights), "cpu")
    message = str(error.value)
    assert all(part in message for part in named) and "\n" not in message


def test_a_vocabulary_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    """Architectures whose tokenizer, or whole text tower, comes from the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot get the tokenizer of ViT-B-16-SigLIP .*timm/ViT-B-16-SigLIP") as error:
        clip_score._tokenizer("ViT-B-16-SigLIP", open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"])
    assert "\n" not in str(error.value)
    config = {**TINY, "text_cfg": {"hf_model_name": "nobody/nothing-here"}}
    with pytest.raises(UserError, match="cannot build Tiny: its text tower needs the config of nobody/nothing-here") as error:
        clip_score._build("Tiny", config)
    assert "\n" not in str(error.value)


def test_what_cannot_be_scored(scorer, images):
    with pytest.raises(ValueError, match="item 1 has no references"):
        score_captions(scorer, images[:2], ["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="4 images, 1 captions and 1 lists"):
        score_captions(scorer, images, ["a"], [["a"]])
    with pytest.raises(ValueError, match="no captions"):
        score_captions(scorer, images[:0], [], [])
    with pytest.raises(ValueError, match="all of one length"):
        score_candidates(scorer, images[:2], [["a"], ["a", "b"]])


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_scores_equal_those_of_transformers(tmp_path, monkeypatch, quick_gelu):
    """The other implementation of CLIP, from the same weights."""
    from transformers import CLIPConfig, CLIPModel

    monkeypatch.setitem(demo.CLIPS, "Tiny", {**TINY, "quick_gelu": quick_gelu})
    activation = "quick_gelu" if quick_gelu else "gelu"
    text = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "hidden_act": activation, "eos_token_id": 49407, "bos_token_id": 49406}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "hidden_act": activation}  # fmt: skip
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    state = {"logit_scale": theirs.logit_scale.data, "text_projection": theirs.text_projection.weight.data.T.contiguous(),
             "visual.proj": theirs.visual_projection.weight.data.T.contiguous()}  # fmt: skip
    for tower, prefix in ((theirs.text_model, ""), (theirs.vision_model, "visual.")):
        for k, layer in enumerate(tower.encoder.layers):
            block = f"{prefix}transformer.resblocks.{k}."
            attention = layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[block + "attn.in_proj_weight"] = torch.cat([part.weight.data for part in projections])
            state[block + "attn.in_proj_bias"] = torch.cat([part.bias.data for part in projections])
            parts = {"attn.out_proj": attention.out_proj, "ln_1": layer.layer_norm1, "ln_2": layer.layer_norm2}
            parts |= {"mlp.c_fc": layer.mlp.fc1, "mlp.c_proj": layer.mlp.fc2}
            for name, module in parts.items():
                state |= {f"{block}{name}.weight": module.weight.data, f"{block}{name}.bias": module.bias.data}
    vision_model, text_model = theirs.vision_model, theirs.text_model
    norms = {"ln_final": text_model.final_layer_norm, "visual.ln_pre": vision_model.pre_layrnorm, "visual.ln_post": vision_model.post_layernorm}
    for name, norm in norms.items():
        state |= {f"{name}.weight": norm.weight.data, f"{name}.bias": norm.bias.data}
    state |= {
        "token_embedding.weight": text_model.embeddings.token_embedding.weight.data,
        "positional_embedding": text_model.embeddings.position_embedding.weight.data,
        "visual.class_embedding": vision_model.embeddings.class_embedding.data,
        "visual.conv1.weight": vision_model.embeddings.patch_embedding.weight.data,
        "visual.positional_embedding": vision_model.embeddings.position_embedding.weight.data,
    }
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "converted.safetensors")
    scorer = load_scorer(f"Tiny:{tmp_path / 'converted.safetensors'}", "cpu")
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = CAPTIONS[:2]
    _, items = score_captions(scorer, scorer.embed_images(pixel_values), captions, [["x"], ["x"]])
    with torch.no_grad():
        outputs = {prompt: theirs(open_clip.tokenize([prompt + text for text in captions]), pixel_values) for prompt in ("", PROMPT)}
    for k in range(2):
        cosines = {prompt: (output.image_embeds[k] @ output.text_embeds[k]).item() for prompt, output in outputs.items()}
        assert items[k]["CLIP_cosine"] == pytest.approx(cosines[""], abs=1e-5)
        assert items[k]["CLIPScore"] == pytest.approx(2.5 * max(cosines[PROMPT], 0), abs=1e-5)


def test_texts_of_like_length_share_a_batch(scorer, encoded, monkeypatch):
    monkeypatch.setattr(clip_score, "TEXT_BATCH", 2)
    texts = ["dog", "a dog on a lawn", "cat", "a cat on a mat"]
    torch.testing.assert_close(scorer.embed_texts(texts), oracle_texts(texts), atol=1e-6, rtol=0)
    assert [len(row) for row in encoded] == [3, 3, 7, 7], "start and end token included"
