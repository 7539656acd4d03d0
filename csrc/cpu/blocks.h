// Everything about a block of a row.

#include "load_store.h"
#include "softmax.h"
#include "statistics.h"
#include "block_statistics.h"
#include "log_zero.h"
#include "block_divergence.h"
#include "block_measures.h"
