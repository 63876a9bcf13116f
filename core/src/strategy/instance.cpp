#include "lacuna/strategy/instance.hpp"

#include <fmt/format.h>

#include <cstring>
#include <utility>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

std::string text_of(const sdk::Error& error) {
  const std::string text(error.text, strnlen(error.text, sizeof error.text));
  return text.empty() ? "it failed without a reason" : text;
}

template <class Role, class... Arguments>
void invoke(const sdk::Entry& entry, const char* name, Role role, Arguments... arguments) {
  const auto owner = [&] { return fmt::format("strategy '{}', role {}", entry.name, name); };
  if (!role) throw Error({owner() + ": it has no such role", "", "", "", ""});
  sdk::Error error{};
  if (role(arguments..., &error) != 0) throw Error({fmt::format("{}: {}", owner(), text_of(error)), "", "", "", ""});
}

}  // namespace

Instance::Instance(const Resolved& resolved) : resolved_(resolved), entry_(&resolved.type->entry()) {
  const sdk::Common common = resolved_.common();
  sdk::Error error{};
  const bool failed = entry_->create(resolved_.own.dump().c_str(), &common, &self_, &error) != 0;
  if (failed || !self_) {
    throw Error({fmt::format("strategy '{}' could not be made: {}", entry_->name, text_of(error)), "", "",
                 resolved_.type->library(), ""});
  }
}

Instance::~Instance() {
  if (self_) entry_->destroy(self_);
}

Instance::Instance(Instance&& other) noexcept
    : resolved_(std::move(other.resolved_)), entry_(other.entry_), self_(std::exchange(other.self_, nullptr)) {}

void Instance::plan(sdk::Services& s, sdk::Plan& plan) { invoke(*entry_, "plan", entry_->plan, self_, &s, &plan); }
void Instance::index(sdk::Services& s, const sdk::Dirty& dirty) {
  invoke(*entry_, "index", entry_->index, self_, &s, &dirty);
}
void Instance::score(sdk::Services& s, sdk::Scores& scores) {
  invoke(*entry_, "score", entry_->score, self_, &s, &scores);
}
void Instance::mark(sdk::Services& s, const sdk::Budget& budget, sdk::Selection& selection) {
  invoke(*entry_, "mark", entry_->mark, self_, &s, &budget, &selection);
}
void Instance::refine(sdk::Services& s, const sdk::Budget& budget, sdk::Selection& selection) {
  invoke(*entry_, "refine", entry_->refine, self_, &s, &budget, &selection);
}
void Instance::allocate_layers(sdk::Services& s, sdk::LayerBudget& budget) {
  invoke(*entry_, "allocate_layers", entry_->allocate_layers, self_, &s, &budget);
}
void Instance::allocate_rows(sdk::Services& s, const sdk::Scores* scores, sdk::Budget& budget) {
  invoke(*entry_, "allocate_rows", entry_->allocate_rows, self_, &s, scores, &budget);
}
void Instance::retain(sdk::Services& s, const sdk::Budget& budget, sdk::Kept& kept) {
  invoke(*entry_, "retain", entry_->retain, self_, &s, &budget, &kept);
}
void Instance::attended(sdk::Services& s, const sdk::Attended& attended) {
  invoke(*entry_, "attended", entry_->attended, self_, &s, &attended);
}
void Instance::rewrite(sdk::Services& s, const sdk::Rewrite& rewrite) {
  invoke(*entry_, "rewrite", entry_->rewrite, self_, &s, &rewrite);
}
void Instance::calibrate(sdk::Services& s, sdk::Calibration& calibration) {
  invoke(*entry_, "calibrate", entry_->calibrate, self_, &s, &calibration);
}

}  // namespace lacuna
