package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/throughline-mqtt/throughline/rules"
)

// runCheck validates configuration and rule files, and reports every problem at once.
func runCheck(_ context.Context, c *cli, args []string) int {
	fs := c.flags("check")
	file := fs.String("config", "", "configuration `FILE`; its rules folder is checked too")
	strict := fs.Bool("strict", false, "exit 1 for warnings too")
	if code, done := c.parse(fs, args); done {
		return code
	}
	paths := fs.Args()
	if *file == "" && len(paths) == 0 {
		if fi, err := os.Stat("rules.d"); err != nil || !fi.IsDir() {
			return c.misuse("check: nothing to check: no -config, no path, and no folder rules.d here")
		}
		paths = []string{"rules.d"}
	}
	var problems []rules.Problem
	var own []netip.AddrPort
	var outboxBytes int64 // not known
	if *file != "" {
		cfg, p := loadConfig(*file, loadOptions{Env: c.env})
		problems = append(problems, p...)
		own, outboxBytes = ownAddresses(cfg.Admin.Address), cfg.Outbox.MaxBytes
		if cfg.Rules.Dir != "" && !hasErrorNamed(p, "rules-dir") {
			paths = append(paths, cfg.Rules.Dir)
		}
	}
	if len(paths) > 0 {
		_, p := rules.Load(paths, ruleOptions(c.env, outboxBytes, false, own))
		problems = append(problems, p...)
	}
	if err := rules.Print(c.stdout, problems); err != nil {
		return c.fail(err, "")
	}
	if rules.HasErrors(problems) || *strict && len(problems) > 0 {
		return exitProblem
	}
	return exitOK
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
