// Behind step.cu: its threads, and what the test calls.

static const Plan* plan;
static int tokens;
static u32 told;
static float* wanted;

static void thread_main() {
    decode_row(plan, tokens, told, wanted);
    running->done = true, ++moved;
}

// Run all programs; 0, or 1 if they hung.
extern "C" int run(const Plan* given, int count, u32 base, float* logits, int seed) {
    plan = given, tokens = count, told = base, wanted = logits;
    chance.seed(seed);
    preceded = true;
    return !run_together(0, 0, GRID, ALL_THREADS, nullptr, 0);
}
