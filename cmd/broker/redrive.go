package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
)

// outboxChange is broker outbox retry and broker outbox purge.
func outboxChange(ctx context.Context, c *cli, verb string, args []string) int {
	name := "outbox " + verb
	fs, file, asJSON := outboxFlags(c, name)
	var req admin.ChangeRequest
	for flag, about := range map[string]struct {
		text string
		to   **string
	}{
		"rule":        {"only of this rule", &req.Rule},
		"destination": {"only to this destination", &req.Destination},
		"state":       {"only queued or only dead", &req.State},
		"older-than":  {"only what was published longer ago than this `DURATION`", &req.OlderThan},
	} {
		fs.Func(flag, about.text, func(v string) error {
			if v == "" { // of a variable that is not set, say
				return errors.New("it is empty")
			}
			*about.to = &v
			f, err := admin.ParseFilter(url.Values{strings.ReplaceAll(flag, "-", "_"): {v}})
			if err == nil && flag == "older-than" && f.OlderThan == 0 {
				return errors.New("expected more than zero")
			}
			return errors.Unwrap(err) // the flag's name is told anyway
		})
	}
	fs.BoolVar(&req.All, "all", false, "all that is queued and all that is dead")
	fs.BoolVar(&req.DryRun, "dry-run", false, "say what would be done, and do nothing")
	ids, code, done := c.parseMixed(fs, args)
	if done {
		return code
	}
	if len(ids) > 0 {
		req.IDs = &ids
	}
	switch _, err := req.Change(); {
	case errors.Is(err, admin.ErrNoFilter):
		fmt.Fprintf(c.stderr, "error: %s: nothing says which records\n", name)
		fmt.Fprintln(c.stderr, "hint: give webhook-ids, -rule, -destination, -state or -older-than, or -all; -dry-run counts and changes nothing")
		return exitUsage
	case err != nil:
		return c.misuse("%s: %v", name, err)
	}

	var total admin.Changed
	each := func(a admin.Changed) {
		sum(&total, a)
		if a.Next != "" {
			fmt.Fprintf(c.stderr, "%d so far, going on\n", total.Queued+total.Dead)
		}
	}
	_, code = ofOutbox(ctx, c, *file, outboxCall[struct{}]{
		running: func(a adminConfig) (struct{}, error) {
			return struct{}{}, goOn(req, each, func(r admin.ChangeRequest) (admin.Changed, error) {
				return askChange(ctx, a, verb, r)
			})
		},
		atRest: func(o admin.Outbox) (struct{}, error) {
			do := admin.Retry
			if verb == "purge" {
				do = admin.Purge
			}
			return struct{}{}, goOn(req, each, func(r admin.ChangeRequest) (admin.Changed, error) { return do(ctx, o, r) })
		},
	})
	if total.Destinations == nil { // it didn't come to anything
		return code
	}
	if *asJSON {
		return max(code, c.writeJSON(total))
	}
	tellChanged(c, verb, total)
	return code
}

// parseMixed is parse for flags and arguments in any order: a flag behind an
// argument is no argument, least of all -dry-run.
func (c *cli) parseMixed(fs *flag.FlagSet, args []string) (rest []string, code int, done bool) {
	for {
		if code, done := c.parse(fs, args); done {
			return nil, code, true
		}
		if fs.NArg() == 0 {
			return rest, 0, false
		}
		rest, args = append(rest, fs.Arg(0)), fs.Args()[1:]
	}
}

// goOn calls do until all is done. A full destination doesn't keep the others
// from it; the error then is the first of that kind.
func goOn(r admin.ChangeRequest, each func(admin.Changed), do func(admin.ChangeRequest) (admin.Changed, error)) error {
	var full error
	for {
		done, err := do(r)
		if done.Destinations != nil {
			each(done)
		}
		if err != nil && done.Next != "" {
			full, err = cmp.Or(full, err), nil
		}
		switch {
		case err != nil && r.After != "" && errors.Is(err, syscall.ECONNREFUSED):
			return brokerError{errors.New("the broker is gone"), "what was done is kept; the same command goes on with the rest"}
		case err != nil:
			return err
		case done.Next == "":
			return full
		}
		r.After = done.Next
	}
}

// brokerError is the answer of a broker that is the right one, or its end.
type brokerError struct {
	error
	hint string
}

// askChange asks the admin API for one part of a retry or purge. With an error,
// Changed is what was done before it.
func askChange(ctx context.Context, a adminConfig, verb string, r admin.ChangeRequest) (out admin.Changed, err error) {
	body, err := json.Marshal(r)
	if err != nil {
		return out, err
	}
	answer, err := askBroker(ctx, a, http.MethodPost, "/api/v1/outbox/"+verb, body)
	switch {
	case err != nil:
		return out, err
	case answer.status == http.StatusOK:
		return out, readAnswer(answer.body, &out)
	}
	var problem admin.FailedChange
	if !answer.problem || json.Unmarshal(answer.body, &problem) != nil || problem.Done == nil {
		return out, answer.refused()
	}
	hint := ""
	if answer.status == http.StatusInsufficientStorage {
		hint = "deliver or purge what is queued there first, or raise its max_bytes, or outbox.max_bytes_per_destination"
	}
	return *problem.Done, brokerError{errors.New(printable(problem.Detail)), hint}
}

// sum adds b to a.
func sum(a *admin.Changed, b admin.Changed) {
	a.DryRun = b.DryRun
	add := func(a *bridge.Count, b bridge.Count) {
		a.Queued += b.Queued
		a.Dead += b.Dead
		a.Damaged += b.Damaged
	}
	add(&a.Count, b.Count)
	if a.Destinations == nil {
		a.Destinations = map[string]bridge.Count{}
	}
	for name, n := range b.Destinations {
		of := a.Destinations[name]
		add(&of, n)
		a.Destinations[name] = of
	}
}

// tellChanged says how many records of which destination, a line each.
func tellChanged(c *cli, verb string, total admin.Changed) {
	done, would := "retried", "would retry"
	if verb == "purge" {
		done, would = "purged", "would purge"
	}
	if len(total.Destinations) == 0 {
		fmt.Fprintln(c.stdout, "nothing matches, nothing is "+done)
		return
	}
	if total.DryRun {
		done = would
	}
	for _, name := range slices.Sorted(maps.Keys(total.Destinations)) {
		n := total.Destinations[name]
		fmt.Fprintf(c.stdout, "%s %d queued and %d dead of %s", done, n.Queued, n.Dead, printable(name))
		if n.Damaged > 0 {
			fmt.Fprintf(c.stdout, "; %d dead are damaged and stay", n.Damaged)
		}
		fmt.Fprintln(c.stdout)
	}
}
