package admin

import (
	"net/http"

	"github.com/throughline-mqtt/throughline/rules"
)

// ruleSet is the set in force.
type ruleSet struct {
	Generation   string   `json:"generation"`
	Rules        []string `json:"rules"`
	Destinations []string `json:"destinations"`
}

func (a *api) rules(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, setOf(a.Rules.Current()))
}

func setOf(s *rules.Set) ruleSet {
	out := ruleSet{Rules: []string{}, Destinations: []string{}}
	if s == nil {
		return out
	}
	out.Generation = s.Generation()
	for _, r := range s.Rules() {
		out.Rules = append(out.Rules, r.Name)
	}
	for _, d := range s.Destinations() {
		out.Destinations = append(out.Destinations, d.Name)
	}
	return out
}

// reloaded is the answer to a reload: the set in force after it, and the problems found.
type reloaded struct {
	ruleSet
	Problems []rules.Problem `json:"problems"`
}

func (a *api) reload(w http.ResponseWriter, r *http.Request) {
	result := a.Rules.Reload()
	problems := result.Problems
	if problems == nil {
		problems = []rules.Problem{}
	}
	status := http.StatusOK
	if !result.OK {
		status = http.StatusUnprocessableEntity
	}
	a.Logger.Info("rules reloaded through the admin API", "remote", r.RemoteAddr, "status", status, "problems", len(problems))
	answer(w, status, reloaded{setOf(a.Rules.Current()), problems})
}
