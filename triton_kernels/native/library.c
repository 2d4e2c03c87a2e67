/* All of it as one unit: what the parts share is inlined, and the compiler is started once. */
#include "few_tokens.c"
#include "decode_step.c"
#include "products.c"
#include "grouped_mlp.c"
#include "newton_schulz.c"
#include "softmax_attention.c"
#include "training_norm_and_loss.c"
