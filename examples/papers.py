"""The papers that answer the thread's "are there any papers or talks discussing this?", and what each found."""

from __future__ import annotations

PAPERS = {
    "mozer": ("Mozer, Siddiqui, Liu 2026, The Topological Trouble With Transformers, arXiv 2604.17121",
              "a feedforward model pushes an evolving state deeper with each step until its depth is used up; sorts ways of "
              "recurrence by whether they run along depth or along steps"),
    "song": ("Song, Zhong 2023, Uncovering hidden geometry in Transformers, arXiv 2310.04861",
             "splits states into mean, position, context and rest: the position part is low-dimensional and smooth, the "
             "context part clusters by topic, the two are nearly orthogonal"),
    "wu": ("Wu, Morris, Levine 2024, Do language models plan ahead for future tokens?",
           "myopic training, in which no loss reaches earlier states: clear pre-caching on synthetic data, little at GPT-2's "
           "scale, more in larger models"),
    "pal": ("Pal, Sun, Yuan, Wallace, Bau 2023, Future Lens (CoNLL)",
            "from one state of GPT-J-6B later tokens can be decoded; with a learned soft prompt in more than 48% of cases"),
    "fan": ("Fan, Lavril, Grave, Joulin, Sukhbaatar 2020, Addressing Some Limitations of Transformers with Feedback Memory, "
            "arXiv 2002.09402",
            "the feedback transformer; on its variable-assignment task with 3 variables 99.1% against 33.7% of a standard one"),
    "staircase": ("Ju et al. 2021, Staircase Attention", "recurrence in chunks; on that task 3.6% error against 58.4%"),
    "brt": ("Hutchins et al. 2022, Block-Recurrent "
            "Transformers", "a recurrent layer over blocks, better than Transformer-XL on long texts at twice the speed"),
    "fam": ("Hwang et al. 2024, "
            "TransformerFAM", "a feedback memory for each block without new weights, in models of 1 to 24 billion parameters"),
    "lime": ("Gerasimov et al. 2025, LIMe", "heads that read earlier layers' states of past tokens; stays parallel, and a "
                                            "model of 64 layers beats one of 128"),
    "saunshi": ("Saunshi et al. 2025, looped transformers "
                "(ICLR)", "k layers run L times do about as well as k L layers on reasoning"),
    "merrill23": ("Merrill, Sabharwal 2023, The Parallelism Tradeoff "
                  "(TACL)", "transformers of logarithmic precision lie in uniform TC0"),
    "chiang": ("Chiang 2025, Transformers in uniform TC0", "sharpens that to DLOGTIME-uniform TC0"),
    "merrill24": ("Merrill, Petty, Sabharwal 2024, The Illusion of State in State-Space Models (ICML)",
                  "transformers, S4 and Mamba need depth that grows with length on A5 word problems; a recurrent network needs "
                  "one layer"),
    "li24": ("Li, Liu, Zhou, Ma 2024, Chain of Thought Empowers Transformers to Solve Inherently Serial Problems (ICLR)",
             "constant depth stays in AC0; with T steps written out any circuit of size T can be computed"),
    "liguo": ("Li, Guo, Andreas 2025, (How) Do Language Models Track State? "
              "(ICML)", "trained models learn an associative scan or a version pruned by parity, not step by step"),
    "oren": ("Oren et al. 2024, Transformers are Multi-State RNNs "
             "(EMNLP)", "the cache is an unbounded multi-state; with an eighth of it a model does in some cases nearly as "
                        "well"),
    "janus": ("janus (@repligate), September 2025, How information flows through transformers (a "
              "thread)", "the same light cone, and the number of paths"),
    "he": ("He, Thinking Machines Lab, September 2025, Defeating Nondeterminism in LLM Inference",
           "of 1000 greedy completions 80 were distinct, for kernels whose order depends on the batch; with kernels whose "
           "order does not, all were the same"),
    "sglang": ("SGLang, documentation of deterministic "
               "inference", "an option that works with chunked prefill and prefix caches"),
    "vllm": ("vLLM, documentation of batch invariance", "the same as an option (beta)"),
    "chodavarapu": ("Chodavarapu, Xu 2026, The Illusion of Equivalence, arXiv "
                    "2604.15409", "in float16 all sequences came out differently with the cache on and off; in float32 no "
                                  "answer flipped"),
    "lindsey_bio": ("Lindsey et al. 2025, On the Biology of a Large Language "
                    "Model", "in Claude 3.5 Haiku candidate rhymes are active at the end of the line before, and are used to "
                             "write the line"),
    "lindsey_intro": ("Lindsey 2025, Emergent Introspective "
                      "Awareness", "large models take a word put into their mouth for their own if its concept was injected "
                                   "before: they consult cached earlier states"),
    "dong": ("Dong et al. 2025, Emergent Response Planning "
             "(ICML)", "prompt states predict length, steps, choices and answer of the response; more so in larger models"),
    "plan26": ("What's the plan? 2026, arXiv "
               "2601.20164", "steering at the end of a line changes tokens in between; implicit planning starts from 1 billion "
                             "parameters"),
    "ma26": ("Ma, Rui 2026, Where's the Plan?, arXiv 2605.07984 "
             "(ICML)", "rhymes can be decoded in three families of models, growing with scale, but only the largest model uses "
                       "them: a probe's success is not use"),
    "shai": ("Shai et al. 2024, belief-state "
             "geometry", "on data of a hidden Markov model the stream encodes, linearly, the belief about the hidden state, "
                         "and so the whole future"),
    "geva": ("Geva et al. 2023, Dissecting Recall of Factual "
             "Associations", "attention knockout: the relation's positions first, then the subject's last token"),
    "belitsky": ("Belitsky et al. 2025, KV Cache Steering", "one edit of the cache steers a small model"),
    "c2c": ("Fu et al. 2025, "
            "Cache-to-Cache", "handing a cache on instead of a text is 3 to 5% more accurate and about twice as fast"),
    "huang25": ("Huang et al. 2025, LMs do not have human-like working "
                "memory", "17 models are inconsistent when they are to hold a number in mind"),
    "karpathy": ("Karpathy, interview with Dwarkesh Patel, October "
                 "2025", "the weights are a hazy recollection, the context is working memory"),
    "sun24": ("Sun et al. 2024, Massive Activations in Large Language Models, arXiv "
              "2402.17762", "a few features, over 1000 times the median, at the first token and at delimiters"),
    "sun26": ("Sun, Canziani, LeCun, Zhu 2026, arXiv "
              "2603.05498", "massive activations act as implicit parameters, sinks are local, and the norm before a block "
                            "couples them"),
    "ferrando": ("Ferrando, Voita 2024, Information Flow "
                 "Routes", "edges by what they add, in one pass, about 100 times as fast as patching"),
    "dkv": ("Ma et al. 2025, dKV-Cache, arXiv "
            "2505.15781", "in diffusion language models a token's states settle once it is decoded; cached with a delay, 2 to "
                          "10 times as fast"),
    "fastdllm": ("Wu et al. 2025, Fast-dLLM, arXiv "
                 "2505.22618", "keys and values of neighbouring steps are nearly the same; up to 27.6 times as fast"),
    "dllmcache": ("dLLM-Cache 2025, arXiv "
                  "2506.06295", "the prompt is static, the response partly dynamic; up to 9.1 times fewer operations"),
}  # fmt: skip
