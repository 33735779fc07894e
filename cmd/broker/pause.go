package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
)

// outboxPause is broker outbox pause and broker outbox resume.
func outboxPause(ctx context.Context, c *cli, verb string, args []string) int {
	name := "outbox " + verb
	fs, file, asJSON := outboxFlags(c, name)
	rest, code, done := c.parseMixed(fs, args)
	switch {
	case done:
		return code
	case len(rest) != 1 || rest[0] == "":
		return c.misuse("%s: expected one destination", name)
	}
	destination := rest[0]
	d, code := ofOutbox(ctx, c, *file, outboxCall[admin.Destination]{
		running: func(a adminConfig) (admin.Destination, error) { return askPause(ctx, a, verb, destination) },
		atRest: func(o admin.Outbox) (admin.Destination, error) {
			do := admin.Resume
			if verb == "pause" {
				do = admin.Pause
			}
			d, err := do(ctx, o, destination)
			if errors.Is(err, bridge.ErrNoDestination) {
				err = fmt.Errorf("neither the rule files nor the outbox know a destination %q", destination)
			}
			return d, err
		},
		defined: true,
	})
	switch {
	case code != exitOK:
		return code
	case *asJSON:
		return c.writeJSON(d)
	}
	state := d.State
	if state == "" {
		state = "not paused"
	}
	fmt.Fprintf(c.stdout, "%s is %s; %d queued\n", printable(d.Name), state, d.Records)
	return exitOK
}

// askPause asks the admin API to pause or resume a destination.
func askPause(ctx context.Context, a adminConfig, verb, name string) (d admin.Destination, err error) {
	r, err := askBroker(ctx, a, http.MethodPost, "/api/v1/destinations/"+url.PathEscape(name)+"/"+verb, nil)
	if err != nil {
		return d, err
	}
	var problem struct {
		Detail string `json:"detail"`
	}
	switch {
	case r.status == http.StatusOK:
		return d, readAnswer(r.body, &d)
	case r.status == http.StatusNotFound && r.problem && json.Unmarshal(r.body, &problem) == nil:
		return d, brokerError{errors.New(printable(problem.Detail)), ""}
	}
	return d, r.refused()
}

// tellPaused says on the side which destinations nothing is sent to.
func (c *cli) tellPaused(paused []admin.PausedDestination) {
	for _, p := range paused {
		why := "by an operator"
		if p.Why == bridge.PausedGone {
			why = "since it answered 410"
		}
		fmt.Fprintf(c.stderr, "%s is paused, %s, from %s on; broker outbox resume %[1]s ends that\n", printable(p.Name), why, p.Since.Format(time.RFC3339))
	}
}

func destinationNames(s *rules.Set) (names []string) {
	for _, d := range s.Destinations() {
		names = append(names, d.Name)
	}
	return names
}
