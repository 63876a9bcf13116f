#include "attention/trace_cases.hpp"

using namespace lacuna::test;

TEST_CASE_TEMPLATE_INVOKE(attention_shipped_trace, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_further_traces, CpuSide);
