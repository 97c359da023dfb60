// Behind attend_prompt.cu: its threads, and what the test calls.

static const Arguments* given;

static void thread_main() {
    prompt_attention(*given);
    running->done = true, ++moved;
}

extern "C" int threads() { return THREADS; }
extern "C" int arguments_bytes() { return sizeof(Arguments); }

// Run so many programs together; 0, or 1 if they hung.
extern "C" int run(const Arguments* arguments, int size, int seed) {
    given = arguments;
    chance.seed(seed);
    preceded = true;
    return !run_together(0, 0, size, THREADS, nullptr, 0);
}
