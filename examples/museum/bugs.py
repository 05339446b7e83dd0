"""The catalogue of the museum: bugs that ports of language models had, each with its name, its cure and who had it.

`bug` completes "a port in which ..."; `fix` is a sentence of its own. `rules` are those of tests/conformance/SPEC.md that
it breaks. `shown` is the suite's model on which it is shown: small and random, of the family that can have the bug.
`seen` are threads and programs of public projects; where nothing stands, nobody is quoted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """One exhibit."""

    name: str
    bug: str
    fix: str
    rules: tuple[str, ...]
    shown: str = "llama"
    seen: str = ""
    bits: bool = False  # only the profile `exact` can tell


def _bugs(*bugs: Bug) -> dict[str, Bug]:
    return {bug.name: bug for bug in bugs}


HEADS_SEEN = "nntile #347, ONNXim #34, fkodom/gqa #5, quant.cpp #61"
ROPE_SEEN = "llama2.c #286 and #431, rasbt/LLMs-from-scratch #747 and #750, torchtitan #335, llama.cpp #7481"

HEADS = _bugs(
    Bug("KvHeadDividedByG", "query head h reads key/value head h // G", "It is h // (H/G).", ("I1",), seen=HEADS_SEEN),
    Bug("KvHeadModuloG", "query head h reads key/value head h % G", "It is h // (H/G): neighbouring query heads share one.",
        ("I1",), seen=HEADS_SEEN),
    Bug("KvRepeatedBeforeCaching", "keys and values are repeated for each query head before they are cached",
        "Cache G heads, and let each query head read its own: the logits are right so, but the cache is H/G times too large.",
        ("I1", "K1"), seen="mlx-examples"),
    Bug("QkNormOverAllHeads", "the q/k norm is taken over all heads together", "Each head is normed by itself, over hd.",
        ("B2",), "qwen3", "Qwen3 ports"),
    Bug("QkNormAfterRope", "the q/k norm comes after RoPE", "It comes before.", ("B2",), "qwen3"),
    Bug("QkvBiasMissing", "the biases of q, k and v are left out", "Add bq, bk and bv before anything else.",
        ("B2", "L1"), "qwen2", "Qwen2 ports"),
    Bug("KeysAndValuesSwapped", "keys and values are taken for each other", "The order is q, k, v.", ("B2", "C4")),
    Bug("ScaleByWidth", "scores are scaled by 1/sqrt(D)", "It is attn_scale, by default 1/sqrt(hd).", ("A2", "C1")),
    Bug("ScaleOfConfigIgnored", "scores are scaled by 1/sqrt(hd) whatever attn_scale says",
        "Gemma has a scale of its own, query_pre_attn_scalar^(-1/2).", ("A2", "C1"), "gemma3"),
    Bug("ScaledTwice", "the query is scaled, and then the score again", "Scale the score, once.", ("A2",)),
    Bug("ScaleMissing", "scores are not scaled", "Multiply each by attn_scale.", ("A2", "C1")),
)  # fmt: skip

POSITIONS = _bugs(
    Bug("RopePairs", "RoPE turns the other pairs: neighbours (2i, 2i+1) instead of halves (i, i + hd/2), or the reverse",
        "rope_pairs says which; Hugging Face files want halves, GGUF files of Llama models neighbours.", ("I4", "R2"),
        seen=ROPE_SEEN),
    Bug("RopeBackwards", "RoPE turns the other way", "y0 = x0 cos - x1 sin, y1 = x0 sin + x1 cos.", ("R2",)),
    Bug("RopeBaseOther", "RoPE's base is always 10000", "The config says it: 100000 for SmolLM2, 500000 for Llama 3.",
        ("R1", "C1"), seen="llama2.c variants"),
    Bug("RopeScalingMissing", "RoPE's divisors (Llama 3's scaling) are ignored", "Divide each frequency by its divisor.",
        ("R1", "C1"), "llama3", "llama2.c variants"),
    Bug("RopeLocalMissing", "sliding layers turn by the RoPE of the others", "They have rope_local, if the config has one.",
        ("R1", "C1"), "gemma3"),
    Bug("RopeAngleFloat32", "RoPE's frequencies and angles are computed in float32",
        "Frequency and angle are float64; only cos and sin become float32.", ("R1",)),
    Bug("RopeFrequencyFloat32", "RoPE's frequencies are rounded to float32", "Frequency and angle are float64.", ("R1",)),
    Bug("RopeExponentHalved", "RoPE's frequencies are base^(-i/hd)", "They are base^(-2i/hd).", ("R1",)),
    Bug("RopeDivisorMultiplies", "RoPE's frequencies are multiplied by their divisors", "They are divided by them.",
        ("R1", "C1"), "llama3"),
    Bug("RopeRampNotClamped", "the ramp of Llama 3's scaling goes on past its two ends", "Clamp m to 0 and 1.", ("C4",),
        "llama3_hf"),
    Bug("RopePairOverwritten", "RoPE writes a pair's first feature before the second has read it",
        "Read x0 and x1, then write both.", ("R2",)),
    Bug("ValuesRotated", "RoPE turns the values, too", "It turns q and k.", ("B2",)),
    Bug("PositionsRestart", "positions begin at 0 again in each call", "A call begins at the cache's length.", ("K4",),
        seen="nanoVLM #71, picoGPT #7"),
    Bug("KeysCachedBeforeRope", "keys are cached before RoPE and turned by whoever reads them",
        "Cache them after RoPE. The logits are right so, but the cache and the trace are not.", ("K1",),
        seen="TransformerLens against Hugging Face"),
    Bug("KeysRotatedTwice", "keys are turned when cached and again when read", "Turn them once, before caching.", ("K1",),
        seen="TransformerLens against Hugging Face"),
)  # fmt: skip

MASKS = _bugs(
    Bug("MaskSeesNext", "a position sees the one after it", "Position p reads slots up to p.", ("I2",),
        seen="text-generation-webui #4145"),
    Bug("MaskMissesSelf", "a position does not see itself", "Position p reads slots up to p, its own among them.", ("I2",),
        seen="text-generation-webui #4145"),
    Bug("ChunkMaskIgnoresPast", "the mask of a chunk forgets what is cached: row t reads slots 0 to t",
        "Row t is position start + t and reads slots 0 to start + t.", ("I2",), seen="nanoGPT #613, nanoVLM #71"),
    Bug("MaskAfterSoftmax", "the mask is applied after the softmax, so that weights don't sum to 1",
        "Leave masked slots out before the softmax.", ("A3", "A6")),
    Bug("WindowOneLonger", "the window is one position too long", "It counts the position itself.", ("I2",), "gemma3"),
    Bug("WindowOneShorter", "the window is one position too short", "It counts the position itself.", ("I2",), "gemma3"),
    Bug("WindowIgnored", "sliding layers see everything", "They read the last `window` slots up to their own.", ("I2",),
        "gemma3"),
    Bug("SlidingLayersSwapped", "the window is applied to the other layers", "`sliding` says which layers slide.",
        ("I2", "C1"), "gemma3"),
    Bug("FirstDecodeOneLate", "the first decoded token goes one slot too far, and a slot that nobody wrote is read as zeros",
        "The next position is the cache's length.", ("K4", "K1"), seen="llama3.np"),
    Bug("EveryLayerSlides", "the window is applied to every layer", "`sliding` says which layers slide.", ("I2", "C1"),
        "gemma3"),
    Bug("AllCutGivesNaN", "a head that reads nothing gives NaN", "Where every score is -inf, subtract 0, and divide by 1.",
        ("A3", "D1")),
    Bug("SoftmaxWithoutMaximum", "the softmax doesn't subtract the maximum, so that scores above 88 overflow",
        "Subtract the largest score first.", ("A3",)),
)  # fmt: skip

BLOCKS = _bugs(
    Bug("EpsOutsideRoot", "eps is added to the root", "It is added to the mean square, under the root.", ("M1", "M2")),
    Bug("EpsOfOtherModel", "eps is 1e-6 where the model has 1e-5, or the reverse", "The config says it.", ("M1", "C1"),
        seen="llama3.np"),
    Bug("LayerNormAsRms", "layer norm doesn't subtract the mean", "Subtract it, then take the mean square.", ("M2",), "gpt2"),
    Bug("VarianceUnbiased", "the variance is divided by K - 1", "Divide by K.", ("M2",), "gpt2"),
    Bug("NormAfterAdd", "the norm comes after the residual addition", "It comes before the sublayer: x + f(norm(x)).",
        ("B2", "B3")),
    Bug("ResidualAfterNorm", "the residual connection begins after the norm: norm(x) + f(norm(x))",
        "It is x + f(norm(x)).", ("B2", "B3", "T1")),
    Bug("MlpReadsResidPre", "the MLP reads what attention read", "It reads the stream after attention was added.",
        ("B1", "B3")),
    Bug("PostNormsMissing", "the norms after the sublayers are left out", "With post_norms: x + norm(f(norm(x))).",
        ("B2", "B3"), "gemma3"),
    Bug("PostNormOnTheStream", "the norm after a sublayer is applied to the sum",
        "It is applied to the sublayer's output, before the addition.", ("B2", "B3"), "gemma3"),
    Bug("FinalNormMissing", "the final norm is left out", "logits = head(norm(x)).", ("B4",)),
    Bug("LastStateNormed", "the last layer's resid_post is taken after the final norm",
        "It is the stream itself. Hugging Face's hidden_states[-1] is normed: compare the others.", ("B5",),
        seen="Hugging Face transformers"),
    Bug("GateAndUpSwapped", "gate and up are swapped: the activation is on the wrong one",
        "act(gate) * up; in Meta's names w1 is the gate and w3 is up.", ("B3", "F8"), seen="llama2.c's names"),
    Bug("GeluByErf", "GELU is computed with erf where the model has the tanh formula", "gelu_tanh is GPT-2's and Gemma's.",
        ("F5",), "gpt2"),
    Bug("GeluByTanh", "GELU is computed with tanh where the model has erf", "gelu is the one with erf.", ("F6",), "gpt2"),
    Bug("ReluLosesNaN", "relu is a maximum that passes NaN over", "A NaN stays one.", ("F7",)),
    Bug("ClampLosesNaN", "exp and erf clamp by a minimum and a maximum that pass NaN over", "A NaN stays one: compare.",
        ("F1", "F3")),
    Bug("EmbedScaleMissing", "the embedding is not multiplied by its scale", "Gemma's is sqrt(D).", ("L3",), "gemma3"),
    Bug("EmbedScaleInBfloat16", "the embedding's scale is rounded to bfloat16", "It is the nearest float32.", ("L3",),
        "gemma3"),
    Bug("HeadTiedAnyway", "the embedding is used as the head of a model whose head is its own",
        "Only tied_head makes it the embedding.", ("B4", "C2"), "llama3", "llama2.c's header, where a negative number says so"),
)  # fmt: skip

FILES = _bugs(
    Bug("Conv1DNotTransposed", "GPT-2's matrices are not transposed when they are loaded",
        "Its files keep them [inputs, outputs].", ("C4",), "gpt2_hf", "nanoGPT's loader, which names the four"),
    Bug("FusedSplitWrong", "c_attn is split as q, v, k", "Its rows are q, k, v.", ("C4",), "gpt2_hf"),
    Bug("FusedSplitByHead", "c_attn is split head by head", "Its rows are q of all heads, then k, then v.", ("C4",), "gpt2_hf"),
    Bug("NormsWithoutOne", "Gemma's norms multiply by w", "They multiply by 1 + w, where the file holds w.", ("C4", "M3"),
        "gemma3_hf"),
    Bug("HeadNormsWithoutOne", "Gemma's q and k norms multiply by w, the others by 1 + w", "All multiply by 1 + w.",
        ("C4", "M3"), "gemma3_hf"),
    Bug("NibblesInterleaved", "byte j of a block's nibbles is taken for elements 2j and 2j + 1",
        "Its low half is element j, its high half element j + 16.", ("C6",)),
    Bug("HalfSubnormalsLost", "a half-precision number below 2^-14 is taken for 0", "It is its fraction times 2^-24.", ("C6",)),
    Bug("ScalesHighBitsLost", "the scales of the last four groups of Q4_K and Q5_K have four bits",
        "They have six: two stand with those of the first four groups.", ("C6",)),
    Bug("ScalesHighBitsSwapped", "the last four scales and minima of Q4_K and Q5_K have each other's upper two bits",
        "s takes those of s[g - 4], n those of s[g].", ("C6",)),
    Bug("CacheInFloat64", "the cache, and everything after it, is float64", "Everything is float32.", ("N1", "J4"),
        seen="llama3.np: np.zeros is float64"),
    Bug("OverflowBeginsAgain", "a full context begins again at slot 0 and overwrites it",
        "More positions than n_ctx are refused, and nothing changes.", ("K5",), seen="rasbt's test_context_overflow_bug"),
    Bug("TokenIdUnchecked", "a token id outside of the vocabulary is taken modulo V", "It is refused.", ("E1",)),
    Bug("UnwrittenSlotRead", "a slot can be read before anything was written to it", "It is refused.", ("K2",),
        seen="llama3.np"),
    Bug("WriteAnywhere", "a key can be written to a slot that is not the next", "Entries are written once, in order.", ("K1",)),
    Bug("HashOverBytes", "the hash of a key goes over its bytes", "It goes over its 32-bit words, each as one unit.", ("J5",)),
)  # fmt: skip

CHOICES = _bugs(
    Bug("XorShiftInstead", "the random generator is xorshift64*, for which the seed 0 stays 0", "It is PCG32.", ("G1",),
        seen="llama2.c #238 and #239"),
    Bug("PcgSeededWithoutSteps", "PCG32 begins with the seed as its state", "Step, add the seed, step.", ("G1",)),
    Bug("PcgRotatesLeft", "PCG32's last rotation goes to the left", "It goes to the right.", ("G1",)),
    Bug("LastOfEqualLogits", "of equal logits the last one is taken", "It is the lowest id.", ("G2",)),
    Bug("TopPBeforeSorting", "cumulative probabilities are compared before the tokens are sorted",
        "Sort by falling logit first.", ("G3",), seen="llama2.c #238 and #239"),
    Bug("TopPDropsTheCrossing", "top_p leaves out the token with which the sum reaches p", "It is kept.", ("G3",)),
    Bug("TemperatureMultiplies", "logits are multiplied by the temperature", "They are divided by it.", ("G3",)),
    Bug("StopTokenPrinted", "the token that ends the text is given out", "It is not.", ("G4",)),
    Bug("SpaceBeforeText", "a space is put before the text", "A byte-level tokenizer takes the text as it is.", ("X1",)),
    Bug("DecodedTokenByToken", "each token is decoded by itself, so that a character spread over several is lost",
        "Join the bytes, then decode.", ("X2",)),
    Bug("LettersStripped", "strip(\"<s>\") takes the letters <, s and > off the ends of every token",
        "Leave the text as it is.", ("X2",), seen="llama3.np, whose sample text reads 'full of flower'"),
)  # fmt: skip

BITS = {
    bug.name: Bug(**{**vars(bug), "bits": True})
    for bug in (
        Bug("FmaRoundedTwice", "fma is computed in float64 and rounded again", "N3 says how to round once.", ("N2", "N3")),
        Bug("MultiplyThenAdd", "fma is a multiplication and then an addition", "fma rounds once.", ("N2", "L1")),
        Bug("BlasOrder", "a matrix product is a library's", "Add the products in the order k = 0, 1, ...", ("L1",),
            seen="every engine that prefills through a BLAS"),
        Bug("ProductsInFourLanes", "a sum of products has four lanes", "It has one: k = 0, 1, ...", ("L1", "A2")),
        Bug("ProductsInFloat64", "a sum of products is float64 and rounded at its end", "Each fma is float32.", ("L1", "A2")),
        Bug("BiasFirst", "sums begin at the bias", "They begin at +0; the bias is added last.", ("L1",)),
        Bug("FlushToZero", "subnormal results become 0", "Keep subnormals: no flush-to-zero mode.", ("N1",)),
        Bug("LibraryExp", "exp is the library's", "F1 gives its steps.", ("F1",)),
        Bug("LibraryTanh", "tanh is the library's", "F2 gives its steps.", ("F2",), "gpt2"),
        Bug("SumInOneLane", "a sum goes from left to right", "It has sixteen lanes.", ("S1",)),
        Bug("SumInEightLanes", "a sum has eight lanes", "It has sixteen.", ("S1",)),
        Bug("LanesAddedInOrder", "the sixteen lanes are added one after the other", "They are added pairwise.", ("S1",)),
        Bug("LanesAddedByNeighbours", "lanes 0 and 1, 2 and 3, ... are added first", "Lane i and lane i + 8 are.", ("S1",)),
        Bug("SquaresWithoutFma", "squares are rounded before they are added", "They go in by fma.", ("S1",)),
        Bug("NormDivides", "x is divided by the root", "It is multiplied by r = 1/root.", ("M1",)),
        Bug("ScaleTimesWeightFirst", "a norm is x times (r times w)", "It is (x times r) times w.", ("M1", "N1")),
        Bug("MeanTimesInverse", "the mean is a sum times 1/K", "It is the sum over K.", ("M2",), "gpt2"),
        Bug("FrequencyByPow", "RoPE's frequencies are what pow of float64 gives", "They are the nearest float64.", ("R1",)),
        Bug("RopeOtherProducts", "RoPE rounds the other products: y0 = fma(-x1, sin, x0 cos), y1 = fma(x1, cos, x0 sin)",
            "y0 = fma(x0, cos, -(x1 sin)), y1 = fma(x0, sin, x1 cos).", ("R2",)),
        Bug("RopeOtherProductInY0", "RoPE rounds the other product of y0: y0 = fma(-x1, sin, x0 cos)",
            "y0 = fma(x0, cos, -(x1 sin)).", ("R2",)),
        Bug("SiluBySigmoid", "silu is x times 1/(1 + exp(-x))", "It is one division.", ("F4",)),
        Bug("QueryScaledFirst", "the query is scaled, and not the score", "Scale the score.", ("A2",)),
        Bug("ContractedByTheCompiler", "the compiler contracts a * b + c to an fma", "Switch contraction off.", ("N1", "M2"),
            "gpt2"),
        Bug("DividedFirst", "each weight is divided by the sum before it multiplies the value", "Divide z, last.", ("A4",)),
        Bug("MaskedTimesZero", "masked slots are multiplied by a weight of 0", "Leave them out: 0 times infinity is NaN.",
            ("A6",)),
        Bug("CutTimesZero", "the value of a cut edge is multiplied by its weight of 0",
            "Leave it out: 0 times infinity is NaN.", ("D1",)),
    )
}  # fmt: skip

BUGS = HEADS | POSITIONS | MASKS | BLOCKS | FILES | CHOICES | BITS
