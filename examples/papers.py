"""The papers that answer the thread's "are there any papers or talks discussing this?", and what each found."""

from __future__ import annotations

PAPERS = {
    "mozer": (
        "Mozer, Siddiqui, Liu 2026, The Topological Trouble With Transformers, arXiv 2604.17121",
        "a feedforward model pushes an evolving state deeper with each step until its depth is used up; sorts ways of "
        "recurrence by whether they run along depth or along steps",
    ),
    "song": (
        "Song, Zhong 2023, Uncovering hidden geometry in Transformers via disentangling position and context, arXiv 2310.04861",
        "splits states into mean, position, context and rest: the position part is low-dimensional and smooth, the "
        "context part clusters by topic, the two are nearly orthogonal",
    ),
    "wu": (
        "Wu, Morris, Levine 2024, Do language models plan ahead for future tokens?, arXiv 2404.00859",
        "myopic training, in which no loss reaches earlier states: clear pre-caching on synthetic data, little at GPT-2's "
        "scale, more in larger models",
    ),
    "pal": (
        "Pal, Sun, Yuan, Wallace, Bau 2023, Future Lens (CoNLL), arXiv 2311.04897",
        "at some layers of GPT-J-6B one state tells more than 48% of what the model says in the tokens that follow",
    ),
    "fan": (
        "Fan, Lavril, Grave, Joulin, Sukhbaatar 2020, Addressing Some Limitations of Transformers with Feedback Memory, "
        "arXiv 2002.09402",
        "the feedback transformer; on its variable-assignment task with 3 variables 99.1% against 33.7% of a standard one "
        "(by the authors' code)",
    ),
    "staircase": (
        "Ju, Roller, Sukhbaatar, Weston 2021, Staircase Attention for Recurrent Processing of Sequences, arXiv 2106.04279",
        "recurrence in chunks, which solves tasks of tracking that conventional transformers cannot",
    ),
    "brt": (
        "Hutchins, Schlag, Wu, Dyer, Neyshabur 2022, Block-Recurrent Transformers (NeurIPS), arXiv 2203.07852",
        "a transformer layer applied recurrently over blocks: better than a long-range Transformer-XL at twice the speed",
    ),
    "fam": (
        "Hwang et al. 2024, TransformerFAM, arXiv 2404.09173",
        "a feedback memory in each block without new weights, in models of 1, 8 and 24 billion parameters",
    ),
    "lime": (
        "Gerasimov et al. 2025, You Do Not Fully Utilize Transformer's Representation Capacity (LIMe), arXiv 2502.09245",
        "heads that read earlier layers' states of past tokens; stays parallel, and a model of 64 layers beats one of 128",
    ),
    "saunshi": (
        "Saunshi, Dikkala, Li, Kumar, Reddi 2025, Reasoning with Latent Thoughts (ICLR), arXiv 2502.17416",
        "k layers looped L times do nearly as well as k L layers on many reasoning tasks",
    ),
    "merrill23": (
        "Merrill, Sabharwal 2023, The Parallelism Tradeoff (TACL)",
        "transformers of logarithmic precision lie in uniform TC0",
    ),
    "chiang": (
        "Chiang 2025, Transformers in uniform TC0",
        "sharpens that to DLOGTIME-uniform TC0",
    ),
    "merrill24": (
        "Merrill, Petty, Sabharwal 2024, The Illusion of State in State-Space Models (ICML), arXiv 2404.08819",
        "S4 and Mamba are limited much as transformers are (TC0): they cannot compose permutations, which a simple "
        "recurrent network can",
    ),
    "li24": (
        "Li, Liu, Zhou, Ma 2024, Chain of Thought Empowers Transformers to Solve Inherently Serial Problems (ICLR)",
        "constant depth stays in AC0; with T steps written out any circuit of size T can be computed",
    ),
    "liguo": (
        "Li, Guo, Andreas 2025, (How) Do Language Models Track State? (ICML), arXiv 2503.02854",
        "trained models learn an associative scan, or one that parity has pruned, rather than going step by step",
    ),
    "oren": (
        "Oren, Hassid, Yarden, Adi, Schwartz 2024, Transformers are Multi-State RNNs (EMNLP), arXiv 2401.06104",
        "the cache is an unbounded multi-state; with an eighth of it a model does in some cases nearly as well",
    ),
    "janus": (
        "janus (@repligate), September 2025, How information flows through transformers (a thread)",
        "the same light cone, and the number of paths",
    ),
    "he": (
        "He, Thinking Machines Lab, September 2025, Defeating Nondeterminism in LLM Inference",
        "of 1000 greedy completions 80 were distinct, for kernels whose order depends on the batch; with kernels whose "
        "order does not, all were the same",
    ),
    "sglang": (
        "SGLang, documentation of deterministic inference",
        "an option that works with chunked prefill and prefix caches",
    ),
    "vllm": (
        "vLLM, documentation of batch invariance",
        "the same as an option (beta)",
    ),
    "chodavarapu": (
        "Chodavarapu, Xu 2026, The Illusion of Equivalence, arXiv 2604.15409",
        "in float16 all sequences of three models came out differently with the cache on and off; in float32 no token flipped",
    ),
    "lindsey_bio": (
        "Lindsey et al. 2025, On the Biology of a Large Language Model",
        "in Claude 3.5 Haiku candidate rhymes are active at the end of the line before, and are used to write the line",
    ),
    "lindsey_intro": (
        "Lindsey 2025, Emergent Introspective Awareness",
        "large models take a word put into their mouth for their own if its concept was injected before: they consult "
        "cached earlier states",
    ),
    "dong": (
        "Dong, Zhou, Liu, Yang, Lu 2025, Emergent Response Planning in LLMs (ICML), arXiv 2502.06258",
        "simple probes of prompt states tell length, steps, choices, answer and confidence of the response to come",
    ),
    "plan26": (
        "Maar, Paperno, McDougall, Nanda 2026, What's the plan?, arXiv 2601.20164",
        "steering at the end of a line changes the tokens that lead up to its rhyme; implicit planning from 1 billion "
        "parameters on",
    ),
    "ma26": (
        "Ma, Rui 2026, Where's the Plan?, arXiv 2605.07984",
        "rhymes can be decoded in three families of models, more so in larger ones, but only the largest uses them: a "
        "probe's success is not use",
    ),
    "shai": (
        "Shai, Marzen, Teixeira, Gietelink Oldenziel, Riechers 2024, Transformers represent belief state geometry in "
        "their residual stream (NeurIPS), arXiv 2405.15943",
        "on data of a hidden Markov model the stream encodes, linearly, the belief about the hidden state, and so the "
        "whole future",
    ),
    "geva": (
        "Geva et al. 2023, Dissecting Recall of Factual Associations, arXiv 2304.14767",
        "attention knockout: the relation's positions first, then the subject's last token",
    ),
    "belitsky": (
        "Belitsky et al. 2025, KV Cache Steering",
        "one edit of the cache steers a small model",
    ),
    "c2c": (
        "Fu et al. 2025, Cache-to-Cache, arXiv 2510.03215",
        "handing on a cache instead of a text is a few per cent more accurate and at least twice as fast",
    ),
    "huang25": (
        "Huang, Sun, Wang, Dredze 2025, Language Models Do Not Have Human-Like Working Memory, arXiv 2505.10571",
        "17 models contradict themselves when they are to hold a number in mind",
    ),
    "karpathy": (
        "Karpathy, interview with Dwarkesh Patel, October 2025",
        "the weights are a hazy recollection, the context is working memory",
    ),
    "sun24": (
        "Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762",
        "a few features, over 1000 times the median, at the first token and at delimiters",
    ),
    "sun26": (
        "Sun, Canziani, LeCun, Zhu 2026, The Spike, the Sparse and the Sink, arXiv 2603.05498",
        "massive activations act as implicit parameters, sinks are local, and the norm before a block is why they come "
        "together",
    ),
    "ferrando": (
        "Ferrando, Voita 2024, Information Flow Routes, arXiv 2403.00824",
        "edges by what they add, in one pass, about 100 times as fast as patching",
    ),
    "dkv": (
        "Ma et al. 2025, dKV-Cache, arXiv 2505.15781",
        "in diffusion language models a token's states settle once it is decoded; cached with a delay, 2 to 10 times as fast",
    ),
    "fastdllm": (
        "Wu et al. 2025, Fast-dLLM, arXiv 2505.22618",
        "a cache for diffusion language models, of blocks and approximate; with parallel decoding up to 27.6 times the "
        "throughput",
    ),
    "dllmcache": (
        "dLLM-Cache 2025, arXiv 2506.06295",
        "the prompt is static, the response partly dynamic; up to 9.1 times fewer operations",
    ),
}
