package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
)

// runCheck validates configuration and rule files, and reports every problem at once.
func runCheck(ctx context.Context, c *cli, args []string) int {
	fs := c.flags("check")
	file := fs.String("config", "", "configuration `FILE`; its rules folder is checked too")
	strict := fs.Bool("strict", false, "exit 1 for warnings too")
	asJSON := fs.Bool("json", false, "write JSON")
	paths, code, done := c.parseMixed(fs, args)
	if done {
		return code
	}
	if *file == "" && len(paths) == 0 {
		if fi, err := os.Stat("rules.d"); err != nil || !fi.IsDir() {
			return c.misuse("check: nothing to check: no -config, no path, and no folder rules.d here")
		}
		paths = []string{"rules.d"}
	}
	var problems []rules.Problem
	var own []netip.AddrPort
	var outboxBytes int64             // not known
	var waiting func() map[string]int // nor is that
	if *file != "" {
		cfg, p := loadConfig(*file, loadOptions{Env: c.env})
		problems = append(problems, p...)
		own, outboxBytes = ownAddresses(cfg.Admin.Address), cfg.Outbox.MaxBytes
		if cfg.Rules.Dir != "" && !hasErrorNamed(p, "rules-dir") {
			paths = append(paths, cfg.Rules.Dir)
		}
		if !rules.HasErrors(p) {
			waiting = func() map[string]int { return c.waiting(ctx, cfg) }
		}
	}
	if len(paths) > 0 || waiting != nil {
		o := ruleOptions(c.env, outboxBytes, false, own)
		o.Waiting = waiting
		_, p := rules.Load(paths, o)
		problems = append(problems, p...)
	}
	code = exitOK
	if rules.HasErrors(problems) || *strict && len(problems) > 0 {
		code = exitProblem
	}
	if *asJSON {
		return max(code, c.writeJSON(checkReportOf(problems, code == exitOK)))
	}
	if err := rules.Print(c.stdout, problems); err != nil {
		return c.fail(err, "")
	}
	return code
}

// checkReport is what check -json writes.
type checkReport struct {
	Problems []rules.Problem `json:"problems"`
	Summary  checkSummary    `json:"summary"`
}

type checkSummary struct {
	OK       bool `json:"ok"` // the exit code is 0
	Errors   int  `json:"errors"`
	Warnings int  `json:"warnings"`
}

func checkReportOf(problems []rules.Problem, ok bool) checkReport {
	r := checkReport{Problems: problems, Summary: checkSummary{OK: ok}}
	if problems == nil {
		r.Problems = []rules.Problem{}
	}
	for _, p := range problems {
		if p.Severity == rules.Error {
			r.Summary.Errors++
		} else {
			r.Summary.Warnings++
		}
	}
	return r
}

// waiting counts the records that wait, by destination: of the running broker, or of its data directory if none runs. Where
// it can't be told, that is said on the side: it is no problem of the files.
func (c *cli) waiting(ctx context.Context, cfg config) map[string]int {
	const enough = 5 * time.Second // for a broker of this host; files may be checked where there is none
	ctx, cancel := context.WithTimeout(ctx, enough)
	defer cancel()
	records, hint, err := askOutbox(ctx, c, cfg, outboxCall[map[string]int]{
		running: func(a adminConfig) (map[string]int, error) {
			r, err := askBroker(ctx, a, http.MethodGet, "/api/v1/destinations", nil)
			if err != nil {
				return nil, err
			}
			if r.status != http.StatusOK {
				return nil, r.refused()
			}
			var all admin.Destinations
			if err := readAnswer(r.body, &all); err != nil {
				return nil, err
			}
			records := make(map[string]int, len(all.Destinations))
			for _, d := range all.Destinations {
				records[d.Name] = d.Records
			}
			return records, nil
		},
		atRest: func(o admin.Outbox) (map[string]int, error) { return waitingIn(o.Stats()), nil },
	})
	if _, none := errors.AsType[*noOutboxError](err); err != nil && !none {
		fmt.Fprintln(c.stderr, "note: whether records wait for destinations that no rule file defines is not known:", err)
		if hint != "" {
			fmt.Fprintln(c.stderr, "hint:", hint)
		}
	}
	return records
}

// waitingIn counts the records that wait, by destination.
func waitingIn(s bridge.Stats) map[string]int {
	records := make(map[string]int, len(s.Destinations))
	for name, u := range s.Destinations {
		records[name] = u.Records
	}
	return records
}

func hasErrorNamed(problems []rules.Problem, name string) bool {
	return slices.ContainsFunc(problems, func(p rules.Problem) bool { return p.Severity == rules.Error && p.Name == name })
}

// configFor loads file for a command that runs on it, and prints its problems if
// there are errors. Without a file the defaults and the environment hold.
func (c *cli) configFor(file string) (config, bool) {
	cfg, problems := loadConfig(file, loadOptions{Env: c.env, RequireSecrets: true})
	_ = rules.Print(c.stderr, problems) // the exit code says it too
	if rules.HasErrors(problems) {
		fmt.Fprintln(c.stderr, "error: the configuration has problems; nothing was started")
		return config{}, false
	}
	return cfg, true
}
