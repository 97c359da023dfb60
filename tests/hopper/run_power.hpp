// Behind bench/gpu_power.cu: its threads, and what the test calls.

static struct {
    const char *weights, *inputs;
    float* out;
    int chunks;
} given;

static void thread_main() {
    power(given.weights, given.inputs, given.out, given.chunks);
    running->done = true, ++moved;
}

// Run some programs; 0, or 1 if they hung.
extern "C" int run(const char* weights, const char* inputs, float* out, int chunks, int size,
                   int seed) {
    given = {weights, inputs, out, chunks};
    chance.seed(seed);
    preceded = true;
    return !run_together(0, 0, size, WARPS * 32 + 32, nullptr, 0);
}
