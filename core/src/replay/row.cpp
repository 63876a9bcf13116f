#include "lacuna/replay/row.hpp"

#include <algorithm>

namespace lacuna {

const char* name_of(ReplayPhase phase) {
  switch (phase) {
    case ReplayPhase::prefill: return "prefill";
    case ReplayPhase::evict: return "evict";
    case ReplayPhase::decode: return "decode";
  }
  return "?";
}

Json Cell::describe() const {
  Json out;
  if (select) out["select"] = select->describe();
  if (evict) out["evict"] = evict->describe();
  if (allocate) out["allocate"] = allocate->describe();
  out["seed"] = seed;
  return out;
}

std::optional<double> Cell::density(ReplayPhase phase) const {
  const auto& role = phase == ReplayPhase::evict ? evict : select ? select : evict;
  if (role && role->knob) return role->knob->density;
  if (role && role->budget.kind == BudgetSpec::Kind::density) return role->budget.value;
  return std::nullopt;
}

bool Row::marked(const std::string& mark) const { return std::find(marks.begin(), marks.end(), mark) != marks.end(); }

}  // namespace lacuna
