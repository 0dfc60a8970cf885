"""Deliberate faults in the optimizers: (name, file, old text, new text, test that fails with it)."""

from __future__ import annotations

OPTIM, TESTS = "pretrain/optim/", "tests/pretrain/optim/"
ADAM, ADAMW, LAMB, MUON, SGD = (OPTIM + f"{name}.py" for name in ("adam", "adamw", "lamb", "muon", "sgd"))
MATRICES, ASSIGNMENT, EXCHANGE = (OPTIM + f"{name}.py" for name in ("matrices", "assignment", "exchange"))
PLAIN, ON_ONE, BY_HAND = "tests/pretrain/test_optim.py::", TESTS + "test_muon.py::", TESTS + "test_lamb_sgd.py::"
SHARED, RANKS = (
    TESTS + "test_assignment.py::",
    TESTS + "test_layouts.py::test_a_slice_of_the_layouts_trains_as_one_rank",
)
TWO_STEPS, LAYERS = ON_ONE + "test_two_steps_by_hand", BY_HAND + "test_two_steps_of_lamb"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    # ------------------------------------------------------------------------------------------------ what decays, and groups
    (
        "optimizer: everything decays",
        ADAMW,
        "matrix = parameter.ndim >= 2 and not name.endswith(NEVER_DECAYED)",
        "matrix = True",
        PLAIN + "test_matrices_decay_and_nothing_else",
    ),
    (
        "optimizer: convolution taps decay",
        ADAMW,
        '("embedding.weight", ".conv", ',
        '("embedding.weight", ',
        PLAIN + "test_matrices_decay_and_nothing_else",
    ),
    (
        "adamw: groups of decayed and others are exchanged",
        ADAMW,
        "((decayed, self.weight_decay), (others, 0.0))",
        "((others, self.weight_decay), (decayed, 0.0))",
        PLAIN + "test_update_is_decoupled_adamw",
    ),
    (
        "adamw: the two betas are exchanged",
        ADAMW,
        "betas=(self.beta1, self.beta2)",
        "betas=(self.beta2, self.beta1)",
        PLAIN + "test_three_steps_of_adamw_by_hand",
    ),
    (
        "adamw: eps is left to torch",
        ADAMW,
        "eps=self.eps, foreach",
        "foreach",
        PLAIN + "test_three_steps_of_adamw_by_hand",
    ),
    (
        "sgd: momentum is left out",
        SGD,
        "lr=self.lr, momentum=self.momentum, nesterov=self.nesterov",
        "lr=self.lr",
        BY_HAND + "test_sgd_with_nesterov_momentum",
    ),
    (
        "sgd: vectors decay and matrices do not",
        SGD,
        "(self.weight_decay, 0.0)",
        "(0.0, self.weight_decay)",
        BY_HAND + "test_sgd_with_nesterov_momentum",
    ),
    (
        "schedule: the warm-up begins at zero",
        OPTIM + "schedules.py",
        "        if step < self.warmup:\n            return (step + 1) / self.warmup\n        progress",
        "        if step < self.warmup:\n            return step / self.warmup\n        progress",
        PLAIN + "test_cosine_by_value",
    ),
    (
        "schedule: the decay is as long as the plateau",
        OPTIM + "schedules.py",
        "length = round(self.decay * steps)",
        "length = round((1 - self.decay) * steps)",
        PLAIN + "test_warmup_stable_decay_by_value",
    ),
    # ------------------------------------------------------------------------------------------------------------------- LAMB
    (
        "lamb: moments are not corrected for their beginning",
        LAMB,
        "return (first / (1 - config.beta1**step)).div_(root)",
        "return first.clone().div_(root)",
        LAYERS,
    ),
    (
        "lamb: eps is added under the root",
        LAMB,
        "(second / (1 - config.beta2**step)).sqrt_().add_(config.eps)",
        "(second / (1 - config.beta2**step)).add_(config.eps).sqrt_()",
        LAYERS,
    ),
    (
        "lamb: decay comes after the ratio",
        LAMB,
        ".div_(root).add_(weight, alpha=weight_decay)",
        ".div_(root)",
        LAYERS,
    ),
    (
        "lamb: no largest ratio",
        LAMB,
        "ratios if self.config.largest is None else ratios.clamp_max(self.config.largest)",
        "ratios",
        LAYERS,
    ),
    (
        "lamb: all experts of a stack are one layer",
        LAMB,
        "        stack = len(shape) > 2\n",
        "        stack = False\n",
        BY_HAND + "test_each_expert_is_a_layer",
    ),
    (
        "lamb: norms are scaled, too",
        LAMB,
        '"weight_decay": 0.0, "trust": False}',
        '"weight_decay": 0.0, "trust": True}',
        BY_HAND + "test_each_expert_is_a_layer",
    ),
    (
        "lamb: a layer of zeros never moves",
        LAMB,
        "torch.where((weights > 0) & (norms > 0), weights / norms.clamp_min(1e-300), 1.0)",
        "weights / norms.clamp_min(1e-300)",
        BY_HAND + "test_each_expert_is_a_layer",
    ),
    (
        "lamb: norms of what the rank holds",
        LAMB,
        "sums = torch.stack(every).sum(0)",
        "sums = sums.clone()",
        RANKS,
    ),
    (
        "lamb: copies count as often as they are held",
        LAMB,
        "share = parts / (ranks * box.copies)",
        "share = 1.0 / ranks",
        RANKS,
    ),
    # ------------------------------------------------------------------------------------------------------------------- Muon
    (
        "muon: momentum is averaged",
        MUON,
        "torch._foreach_add_(momenta, gradients)",
        "torch._foreach_add_(momenta, gradients, alpha=1 - self.config.momentum)",
        TWO_STEPS,
    ),
    (
        "muon: nesterov looks ahead by the momentum alone",
        MUON,
        "return torch.add(local(parameter.grad), momentum, alpha=self.config.momentum)",
        "return momentum * self.config.momentum",
        TWO_STEPS,
    ),
    (
        "muon: decay is not scaled by the learning rate",
        MUON,
        "torch._foreach_mul_(weights, 1.0 - lr * decay)",
        "torch._foreach_mul_(weights, 1.0 - 0.1 * lr * decay)",
        TWO_STEPS,
    ),
    (
        "muon: an update is as large as inputs say",
        MUON,
        "return 0.2 * math.sqrt(max(matrix.outputs, matrix.inputs))",
        "return 0.2 * math.sqrt(matrix.inputs)",
        TWO_STEPS,
    ),
    (
        "muon: spectral scaling takes an expert's rows for its outputs",
        MATRICES,
        "(columns, rows) if stack else (rows, columns)",
        "(rows, columns)",
        ON_ONE + "test_which_parameters_are_matrices",
    ),
    (
        "muon: AdamW's learning rate is Muon's",
        MUON,
        'group["lr"] * group["ratio"], group["weight_decay"]',
        'group["lr"], group["weight_decay"]',
        ON_ONE + "test_a_separate_learning_rate_for_adamw",
    ),
    (
        "muon: vectors decay",
        MUON,
        "zip(split_by_decay(model), (config.weight_decay, 0.0))",
        "zip(split_by_decay(model), (0.0, config.weight_decay))",
        TWO_STEPS,
    ),
    (
        "muon: queries, keys and values are one matrix",
        MATRICES,
        "sections.get(len(stack) + dim, [(length, length)])",
        "[(length, length)]",
        ON_ONE + "test_which_parameters_are_matrices",
    ),
    (
        "muon: heads are never apart",
        MATRICES,
        "unit = length // count if heads and count < length else length",
        "unit = length",
        ON_ONE + "test_which_parameters_are_matrices",
    ),
    (
        "muon: the head is a matrix",
        MATRICES,
        'HEADS = ("head.weight",)',
        'HEADS = ("no head",)',
        ON_ONE + "test_which_parameters_are_matrices",
    ),
    (
        "muon: AdamW's step of an empty shard is not counted",
        ADAM,
        '                state[parameter]["step"] += 1\n',
        "                pass\n",
        TESTS + "test_adam_part.py::test_a_rank_without_a_part_counts_steps",
    ),
    # ------------------------------------------------------------------------------------------------- the work shared by ranks
    (
        "muon: the first rank does all the work",
        ASSIGNMENT,
        "min(tasks[index].pieces, key=lambda rank: (loads[rank], rank))",
        "min(tasks[index].pieces)",
        SHARED + "test_the_work_is_even_and_those_with_little_choice_come_first",
    ),
    (
        "muon: the dear ones choose first, however little choice others have",
        ASSIGNMENT,
        "(len(tasks[index].pieces), -tasks[index].cost))",
        "-len(tasks[index].pieces))",
        SHARED + "test_the_work_is_even_and_those_with_little_choice_come_first",
    ),
    (
        "muon: copies are sent by whoever comes first",
        ASSIGNMENT,
        "min(holders, key=lambda rank: (abs(rank - owner), rank))",
        "min(holders)",
        SHARED + "test_the_owner_of_a_copy_sends_to_nobody_but_itself",
    ),
    (
        "muon: all matrices travel in one round",
        ASSIGNMENT,
        "taken[owner] // bucket))",
        "0))",
        SHARED + "test_rounds_fill_up",
    ),
    (
        "muon: pieces are put where they lay on their rank",
        ASSIGNMENT,
        "start = tuple(a - b for a, b in zip(low, matrix.offsets))",
        "start = tuple(a - b for a, b in zip(low, offsets))",
        SHARED + "test_row_shards_with_an_uneven_last_one",
    ),
    (
        "muon: what comes back is put where it was taken from on the owner",
        EXCHANGE,
        "offsets = tuple(a - b + c for a, b, c in zip(start, box.whole, box.local))",
        "offsets = tuple(box.local)",
        RANKS,
    ),
    (
        "muon: results go back in another order than they are taken in",
        EXCHANGE,
        "self._flat([stacks.of(slot) for slot in this.give])",
        "self._flat([stacks.of(slot) for slot in this.give[::-1]])",
        RANKS,
    ),
    (
        "muon: ranks work on the first round only",
        EXCHANGE,
        "        leaving: tuple[Any, Tensor, Round] | None = None\n        for number, this in enumerate(self.rounds):\n",
        "        leaving: tuple[Any, Tensor, Round] | None = None\n        for number, this in enumerate(self.rounds[:1]):\n",
        RANKS,
    ),
]
