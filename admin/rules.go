package admin

import (
	"net/http"
	"time"

	"github.com/throughline-mqtt/throughline/rules"
)

// ruleSet is the set in force, and how the last attempt to load another one went.
type ruleSet struct {
	Generation   string   `json:"generation"`
	Rules        []rule   `json:"rules"`
	Destinations []string `json:"destinations"`
	Reload       reload   `json:"reload"`
}

type rule struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Enabled     bool   `json:"enabled"`
	// File is the path that it was loaded from, and Line where it begins there.
	File     string                   `json:"file"`
	Line     int                      `json:"line"`
	Filters  []string                 `json:"filters"`
	Outcomes map[rules.Outcome]uint64 `json:"outcomes"`
}

// reload is how an attempt to load the rule files went.
type reload struct {
	Time time.Time `json:"time"`
	OK   bool      `json:"ok"`
	// Fallback: the set in force is of before the start, since the files have been bad
	// from then on.
	Fallback bool            `json:"fallback,omitempty"`
	Error    string          `json:"error,omitempty"` // the set is in force, but not kept for a restart
	Problems []rules.Problem `json:"problems"`
}

func reloadOf(r rules.Reload) reload {
	out := reload{Time: r.Time, OK: r.OK, Fallback: r.Fallback, Problems: r.Problems}
	if r.Problems == nil {
		out.Problems = []rules.Problem{}
	}
	if r.Err != nil {
		out.Error = r.Err.Error()
	}
	return out
}

func (a *api) rules(w http.ResponseWriter, _ *http.Request) {
	out := ruleSet{Rules: []rule{}, Destinations: []string{}, Reload: reloadOf(a.Rules.Last())}
	if s := a.Rules.Current(); s != nil {
		out.Generation = s.Generation()
		for _, r := range s.Rules() {
			out.Rules = append(out.Rules, ruleOf(r))
		}
		for _, d := range s.Destinations() {
			out.Destinations = append(out.Destinations, d.Name)
		}
	}
	answer(w, http.StatusOK, out)
}

func ruleOf(r *rules.Rule) rule {
	out := rule{
		Name: r.Name, Description: r.Description, Enabled: r.Enabled, File: r.File, Line: r.Line,
		Filters: append([]string{}, r.Filters()...), Outcomes: make(map[rules.Outcome]uint64),
	}
	r.Outcomes().Each(func(o rules.Outcome, n uint64) { out.Outcomes[o] = n })
	return out
}

// reloaded is the answer to a reload: how it went, and the set in force after it.
type reloaded struct {
	Generation string `json:"generation"`
	reload
}

func (a *api) reload(w http.ResponseWriter, r *http.Request) {
	result := a.Rules.Reload()
	status := http.StatusOK
	if !result.OK {
		status = http.StatusUnprocessableEntity
	}
	a.Logger.Info("rules reloaded through the admin API", "remote", r.RemoteAddr, "status", status, "problems", len(result.Problems))
	answer(w, status, reloaded{result.Generation, reloadOf(result)})
}
