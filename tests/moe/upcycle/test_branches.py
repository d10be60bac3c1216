"""Models of several dense ones: Branch-Train-MiX, DUME's fitted router, Innovator's slices beside a shared expert."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_folders import make_model, save
from moe.checkpoint import load_weights, open_model_folder
from moe.cli import main
from moe.convert import ConversionError
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.upcycle import AddExpertConfig, UpcycleConfig
from moe.upcycle.add_expert import add_expert
from moe.upcycle.run import plan, upcycle
from moe.upcycle.statistics import FILE, RidgeStatistics
from tiny import assert_near, tiny_tokens


@pytest.fixture(scope="module")
def dense(tmp_path_factory, prepared_data) -> list[Path]:
    """A parent and three branches: feed-forwards and the rest of each moved apart a little; with a tokenizer."""
    tokenizer = next(prepared_data.glob("prepared-*")) / "tokenizer"
    folders = []
    for number in range(4):
        model = make_model("llama", steps=8, intermediate_size=24, vocab_size=512)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (number > 0) * 0.02 * torch.randn(parameter.shape, generator=generator)
        folder = save(model, tmp_path_factory.mktemp("dense") / f"{number}")
        for file in tokenizer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, ...]:
    """Three texts that have little in common."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (
        "def f(x):\n    return x + {}\n",
        "We have ${} + 1 = x$ and so on.\n",
        "#include <a{}.h>\nint main() {{}}\n",
    )
    for number, line in enumerate(lines):
        (folder / f"{number}.txt").write_text("".join(line.format(i) for i in range(600)))
    return tuple(str(folder / f"{number}.txt") for number in range(3))


@pytest.fixture
def config(dense, texts, tmp_path):
    """Make configurations whose branches are the three of `dense`; fitted routers read little text."""

    def of(*, fits: bool = False, **options) -> UpcycleConfig:
        reading = {"cache_dir": str(tmp_path / "data"), "text_tokens": 600, "text_length": 32, "texts": texts}
        branches = {"branches": tuple(map(str, dense[1:]))}
        return UpcycleConfig(**{**branches, **(reading if fits else {}), **options})

    return of


def opened(folder: Path) -> Model:
    config, reader = open_model_folder(folder)
    model = Model(config, groups=ParallelGroups.single())
    load_weights(model, reader)
    return model.eval()


def made_of(source: Path, out: Path, config: UpcycleConfig) -> Model:
    upcycle(plan(source, config), out)
    return opened(out)


def theirs(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def logits_of(model, token) -> Tensor:
    with torch.no_grad():
        return model(token)[0] if isinstance(model, Model) else model(input_ids=token).logits


TOKENS = partial(tiny_tokens, 3, 24, vocab_size=512)


class TestBranchTrainMix:
    def test_experts_are_the_branches_and_the_rest_is_their_mean(self, dense, tmp_path, config):
        model = made_of(dense[0], tmp_path / "moe", config(method="branch_train_mix"))
        branches = [theirs(folder) for folder in dense[1:]]
        layer, others = model.layers[1], [branch.model.layers[1] for branch in branches]
        for e, other in enumerate(others):
            gate, up = layer.moe.experts.gate_up_proj[e].chunk(2)
            assert torch.equal(gate, other.mlp.gate_proj.weight) and torch.equal(up, other.mlp.up_proj.weight)
            assert torch.equal(layer.moe.experts.down_proj[e], other.mlp.down_proj.weight)
        mean = torch.stack([other.self_attn.q_proj.weight for other in others]).double().mean(0).float()
        assert torch.equal(layer.attention.q_proj.weight, mean)
        embedding = torch.stack([branch.model.embed_tokens.weight for branch in branches]).double().mean(0).float()
        assert torch.equal(model.embed_tokens.weight, embedding)

    def test_branches_that_are_equal_make_the_dense_model(self, dense, tmp_path, config):
        same = (str(dense[2]),) * 3
        model = made_of(dense[2], tmp_path / "moe", replace(config(method="branch_train_mix"), branches=same))
        assert_near(logits_of(model, TOKENS()), logits_of(theirs(dense[2]), TOKENS()), 1e-6)

    def test_one_expert_alone_on_its_own_rest_is_its_branch(self, dense, tmp_path, config):
        options = replace(config(method="branch_train_mix"), average_rest=False, top_k=3)
        model = made_of(dense[2], tmp_path / "moe", options)
        with torch.no_grad():
            for layer in model.layers:
                for e in (0, 2):  # what is left is expert 1, the source's own feed-forward
                    layer.moe.experts.down_proj[e] = 0
                layer.moe.experts.down_proj[1] *= 3
                layer.moe.router.weight.zero_()
        assert_near(logits_of(model, TOKENS()), logits_of(theirs(dense[2]), TOKENS()), 1e-5)

    def test_models_of_ours_are_branches_as_well(self, dense, tmp_path, config):
        main(["import-hf", str(dense[1]), str(tmp_path / "ours")])
        branches = (str(tmp_path / "ours"), str(dense[2]))
        options = replace(config(method="branch_train_mix"), branches=branches)
        mixed = made_of(tmp_path / "ours", tmp_path / "moe", options)
        plain = made_of(dense[1], tmp_path / "same", replace(options, branches=(str(dense[1]), str(dense[2]))))
        assert all(torch.equal(a, b) for a, b in zip(mixed.parameters(), plain.parameters(), strict=True))


class TestInnovator:
    SIZES = {"method": "innovator", "granularity": 4, "top_k": 4}

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
    @pytest.mark.parametrize("scale_on", ["down_proj", "routed_scaling_factor"])
    def test_a_token_that_chooses_a_discipline_gets_the_mixture_of_both_feed_forwards(
        self, dense, tmp_path, config, share, scale_on
    ):
        options = config(**self.SIZES, shared_share=share, scale_on=scale_on, average_rest=False)
        model = made_of(dense[0], tmp_path / "moe", options)
        parent, branch = theirs(dense[0]).model.layers[1].mlp, theirs(dense[2]).model.layers[1].mlp
        moe, x_TD = model.layers[1].moe, torch.randn(1, 9, model.config.hidden_size)
        from moe.routing import RouterContext

        with torch.no_grad():
            # whatever the token, the group of branch 1 has the largest logits
            moe.router.weight.copy_(torch.zeros_like(moe.router.weight))
            moe.router.weight[4:8] = 1.0
            y, _ = moe(x_TD.abs(), RouterContext())
            assert_near(y, share * parent(x_TD.abs()) + (1 - share) * branch(x_TD.abs()), 1e-5)

    def test_all_of_it_shared_is_the_dense_model_whatever_the_router(self, dense, tmp_path, config):
        options = config(**self.SIZES, shared_share=1.0, average_rest=False)
        made = plan(dense[0], options)
        assert made.identity == "exact" and made.factor == 0
        model = made_of(dense[0], tmp_path / "moe", options)
        assert_near(logits_of(model, TOKENS()), logits_of(theirs(dense[0]), TOKENS()), 1e-6)

    def test_branches_that_are_the_parent_make_the_parent(self, dense, tmp_path, config):
        options = replace(config(**{**self.SIZES, "top_k": 8}), branches=(str(dense[0]),) * 3)
        model = made_of(dense[0], tmp_path / "moe", options)
        assert_near(logits_of(model, TOKENS()), logits_of(theirs(dense[0]), TOKENS()), 1e-5)

    def test_it_goes_out_as_qwen2_moe_and_comes_back(self, dense, tmp_path, config):
        model = made_of(dense[0], tmp_path / "moe", config(**self.SIZES))
        main(["export-hf", str(tmp_path / "moe"), str(tmp_path / "hf")])
        assert_near(logits_of(theirs(tmp_path / "hf"), TOKENS()), logits_of(model, TOKENS()), 1e-5)

    def test_a_fitted_router_has_one_row_for_each_discipline(self, dense, tmp_path, config):
        model = made_of(dense[0], tmp_path / "moe", config(**self.SIZES, router="ridge", fits=True))
        weight_ED = model.layers[0].moe.router.weight.detach()
        for e in range(3):
            assert torch.equal(weight_ED[4 * e : 4 * e + 4], weight_ED[[4 * e]].expand(4, -1))
        assert torch.allclose(weight_ED.norm(dim=1) * 0.1, torch.ones(12), atol=1e-6)

    def test_the_published_size_comes_out(self):
        # Qwen2.5-7B with 8 disciplines of 8 slices: 53.3 B parameters, 13.3 B active (arXiv 2507.18671)
        from moe.config import ModelConfig
        from moe.counts import count_parameters
        from moe.routers.topk import TopKConfig

        dense = ModelConfig(
            vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
            intermediate_size=18944, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=18944 // 8,
            shared_expert_intermediate_size=18944, use_shared_expert_gate=True, attention_bias=True,
            max_position_embeddings=32768, tie_word_embeddings=False, router=TopKConfig(norm_topk_prob=True),
        )  # fmt: skip
        count = count_parameters(dense)
        assert count.total / 1e9 == pytest.approx(53.3, rel=0.005)
        assert count.active / 1e9 == pytest.approx(13.3, rel=0.005)


class TestRidgeStatistics:
    def of(self, x_ND: Tensor, domain_N: Tensor, *, order: Tensor | None = None, step: int = 7, num: int = 3):
        statistics = RidgeStatistics(num_layers=1, hidden_size=x_ND.shape[1], num_domains=num)
        order = torch.arange(len(x_ND)) if order is None else order
        for chunk in order.split(step):
            for c in range(num):
                rows = chunk[domain_N[chunk] == c]
                statistics.update(0, x_ND[rows], c)
        return statistics

    def data(self, n: int = 200, d: int = 5) -> tuple[Tensor, Tensor]:
        return torch.randn(n, d), torch.arange(n) % 3

    def test_any_order_and_batches_and_two_processes_give_the_same_sums(self):
        x_ND, domain_N = self.data()
        whole = self.of(x_ND, domain_N, step=200)
        shuffled = self.of(x_ND, domain_N, order=torch.randperm(200), step=13)
        halves = self.of(x_ND[:90], domain_N[:90])
        halves.add(self.of(x_ND[90:], domain_N[90:]))
        for other in (shuffled, halves):
            assert torch.allclose(other.A_LXX, whole.A_LXX, rtol=1e-9, atol=1e-9)
            assert torch.allclose(other.b_LXC, whole.b_LXC, rtol=1e-9, atol=1e-9)
        assert whole.tokens_C.tolist() == [67.0, 67.0, 66.0]

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_the_router_is_ridge_regression_written_out(self, has_bias):
        x_ND, domain_N = self.data()
        fitted = self.of(x_ND, domain_N).solve(0, penalty=0.3, has_bias=has_bias)
        X = torch.cat((x_ND, torch.ones(200, 1)), 1)[:, : None if has_bias else -1].double()
        # augmented least squares: another way than the normal equations
        design = torch.cat((X, 0.3**0.5 * torch.eye(X.shape[1], dtype=torch.float64)))
        target = torch.cat((torch.nn.functional.one_hot(domain_N).double(), torch.zeros(X.shape[1], 3).double()))
        W = torch.linalg.lstsq(design, target).solution
        norm = W[:5].norm(dim=0)
        assert torch.allclose(fitted.weight_CD, (W[:5] / norm).T.float(), atol=1e-6)
        expected = W[5] / norm if has_bias else torch.zeros(3, dtype=torch.float64)
        assert torch.allclose(fitted.bias_C, expected.float(), atol=1e-6)
        assert torch.allclose(fitted.weight_CD.norm(dim=1), torch.ones(3), atol=1e-6)
        assert fitted.residual < 1e-10 and fitted.condition > 1

    def test_recursive_least_squares_agrees(self):
        x_ND, domain_N = self.data(60)
        X, Y = torch.cat((x_ND, torch.ones(60, 1)), 1).double(), torch.nn.functional.one_hot(domain_N).double()
        P, W = torch.eye(6, dtype=torch.float64) / 0.1, torch.zeros(6, 3, dtype=torch.float64)
        for i in range(60):
            x = X[i : i + 1]
            K = P @ x.T / (1 + x @ P @ x.T)
            P = P - K @ x @ P
            W = W + P @ x.T @ (Y[i : i + 1] - x @ W)
        fitted = self.of(x_ND, domain_N).solve(0, penalty=0.1, normalises=False)
        assert torch.allclose(fitted.weight_CD, W[:5].T.float(), atol=1e-6)

    def test_domains_that_lie_apart_are_told_apart(self):
        domain_N = torch.arange(300) % 3
        x_ND = 5 * torch.eye(3)[domain_N] + torch.randn(300, 3)
        fitted = self.of(x_ND, domain_N).solve(0, penalty=1e-2)
        guess_N = (x_ND @ fitted.weight_CD.T + fitted.bias_C).argmax(1)
        assert (guess_N == domain_N).float().mean() > 0.95

    def test_a_domain_without_text_and_inputs_that_are_not_finite_are_refused(self):
        x_ND, domain_N = self.data()
        with pytest.raises(ConversionError, match="domain 2 has no token"):
            self.of(x_ND, domain_N.clamp_max(1)).solve(0, penalty=1.0)
        with pytest.raises(ConversionError, match="not finite"):
            self.of(x_ND.index_fill(0, torch.tensor([3]), float("nan")), domain_N).solve(0, penalty=1.0)


class TestRidge:
    def test_one_expert_a_token_has_the_weight_one_and_runs_as_its_branch(self, dense, tmp_path, config):
        options = config(method="ridge", fits=True, top_k=1, temperature=3.0)
        model = made_of(dense[0], tmp_path / "moe", options)
        with torch.no_grad():
            _, routings = model(TOKENS())
        for routing in routings:
            assert torch.equal(routing.assignment.weight_N, torch.ones(72))

    def test_branches_that_are_equal_make_the_dense_model(self, dense, tmp_path, config):
        for top_k in (1, 2):
            options = replace(config(method="ridge", fits=True, top_k=top_k), branches=(str(dense[1]),) * 3)
            model = made_of(dense[1], tmp_path / f"{top_k}", options)
            assert_near(logits_of(model, TOKENS()), logits_of(theirs(dense[1]), TOKENS()), 1e-6)

    def test_sums_are_what_the_right_experts_would_see(self, dense, tmp_path, config, texts):
        options = config(method="ridge", fits=True)
        upcycle(plan(dense[0], options), tmp_path / "moe")
        statistics, penalty, temperature = RidgeStatistics.load(tmp_path / "moe")
        assert (penalty, temperature) == (1e-2, 0.1)
        assert statistics.tokens_C.tolist() == [608.0] * 3, "19 sequences of 32 tokens"
        # text 1 again, through the new model with every token sent to expert 1
        model = opened(tmp_path / "moe")
        from moe.upcycle.fit import Texts

        read = Texts.of(texts, tokenizer_dir=dense[0], cache_dir=options.cache_dir, sequence_length=32, tokens=600)
        seen = [torch.zeros(model.config.hidden_size, dtype=torch.float64) for _ in model.layers]
        with torch.no_grad():
            for place, layer in enumerate(model.layers):
                layer.moe.router.weight.zero_()
                layer.moe.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))

                def add(_module, inputs, place=place):
                    seen[place] += inputs[0].double().reshape(-1, model.config.hidden_size).sum(0)

                layer.moe.register_forward_pre_hook(add)
            for token_BS, _ in read.batches(1):
                model(token_BS)
        for place in range(len(model.layers)):
            assert_near(statistics.b_LXC[place, :-1, 1], seen[place], 1e-5)

    def test_an_added_expert_equals_upcycling_all_at_once(self, dense, tmp_path, config, texts):
        together = config(method="ridge", fits=True, average_rest=False)
        first = replace(together, branches=together.branches[:2], texts=texts[:2])
        whole = made_of(dense[0], tmp_path / "whole", together)
        upcycle(plan(dense[0], first), tmp_path / "first")
        options = AddExpertConfig(text=texts[2], text_tokens=600, text_length=32, cache_dir=together.cache_dir)
        assert add_expert(tmp_path / "first", dense[3], tmp_path / "grown", options).num_experts == 3
        grown = opened(tmp_path / "grown")
        for (name, value), other in zip(whole.named_parameters(), grown.parameters(), strict=True):
            assert_near(other, value, 1e-6) if "router" in name else None
            assert "router" in name or torch.equal(value, other), name
        sums = [RidgeStatistics.load(tmp_path / name)[0] for name in ("whole", "grown")]
        assert_near(sums[1].A_LXX, sums[0].A_LXX, 1e-12)

    def test_without_a_bias_it_goes_out_to_plain_transformers(self, dense, tmp_path, config):
        options = config(method="ridge", fits=True, router_bias=False)
        model = made_of(dense[0], tmp_path / "moe", options)
        main(["export-hf", str(tmp_path / "moe"), str(tmp_path / "hf")])
        assert_near(logits_of(theirs(tmp_path / "hf"), TOKENS()), logits_of(model, TOKENS()), 1e-5)

    def test_the_commands_say_what_they_do(self, dense, tmp_path, capsys, texts):
        flags = ["--text-tokens", "300", "--text-length", "32", "--cache-dir", str(tmp_path / "data")]
        branches = ["--branches", *map(str, dense[1:3]), "--texts", *texts[:2]]
        out = str(tmp_path / "moe")
        main(["upcycle", str(dense[0]), out, "--method", "ridge", "--top-k", "1", *branches, *flags])
        text = capsys.readouterr().out
        assert "routers are fitted: condition numbers up to" in text and "the branches' mean" in text
        main(["add-expert", out, str(dense[3]), str(tmp_path / "more"), "--text", texts[2], *flags])
        assert "3 experts" in capsys.readouterr().out
        (tmp_path / "moe" / FILE).unlink()
        with pytest.raises(SystemExit):
            main(["add-expert", out, str(dense[3]), str(tmp_path / "other"), "--text", texts[2], *flags])
        assert "keeps no sums of its router" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "branch_train_mix", "branches": ()}, "needs at least 2"),
        ({"method": "branch_train_mix", "num_experts": 8}, "3 branches give 3 experts"),
        ({"method": "ridge", "texts": ()}, "--texts names 0 texts for 3 branches"),
        ({"method": "ridge", "fits": True, "temperature": 0.0}, "--temperature 0.0 must be positive"),
        ({"method": "ridge", "fits": True, "text_length": 999}, "exceeds the 64 positions"),
        ({"method": "ridge", "fits": True, "scoring_func": "sigmoid"}, "softmax"),
        ({"method": "innovator", "granularity": 5, "top_k": 5}, "does not divide intermediate_size"),
        ({"method": "innovator", "granularity": 4, "top_k": 2}, "does not divide --top-k"),
        ({"method": "innovator", "granularity": 0}, "--granularity 0 must be at least 1"),
        ({"method": "innovator", "texts": ("a",)}, "add --router ridge"),
        ({"method": "innovator", "top_k": 1}, "no gradient"),
        ({"method": "innovator", "shared_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"method": "branch_train_mix", "shared_share": 0.2}, "needs --shared-expert"),
        ({"method": "copy"}, "belongs to method branch_train_mix and innovator and ridge, not copy"),
        ({"method": "branch_train_mix", "branches": ("nowhere", "nowhere")}, "is no model folder, run or checkpoint"),
    ],
)
def test_wrong_combinations_are_refused_before_anything_is_read(dense, config, options, message):
    with pytest.raises(ConversionError, match=message):
        plan(dense[0], config(**options))


def test_a_branch_of_another_architecture_is_refused(dense, tmp_path, config):
    other = save(make_model("llama", steps=1, intermediate_size=48, vocab_size=512), tmp_path / "other")
    options = replace(config(method="branch_train_mix"), branches=(str(dense[1]), str(other)))
    with pytest.raises(ConversionError, match="intermediate_size = 48, there 24"):
        plan(dense[0], options)
