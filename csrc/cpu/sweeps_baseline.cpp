// The sweeps for any processor the compiler targets by default.
#define ROBUSTFT_SWEEPS kBaseline
#define ROBUSTFT_ISA "DEFAULT"
#include "sweeps.inc"
