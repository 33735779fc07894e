package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/throughline-mqtt/throughline/admin"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/bridge/outbox"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/store"
)

// maxListing bounds an answer of the admin API.
const maxListing = 256 << 20

// runOutbox lists, shows, retries and purges what waits and what is dead, and
// pauses destinations: of the running broker, or, if none runs, in its data
// directory.
func runOutbox(ctx context.Context, c *cli, args []string) int {
	if len(args) == 0 {
		return c.misuse("outbox: say what to do: ls, show, retry, purge, pause, resume or compact")
	}
	switch args[0] {
	case "ls":
		return outboxList(ctx, c, args[1:])
	case "show":
		return outboxShow(ctx, c, args[1:])
	case "retry", "purge":
		return outboxChange(ctx, c, args[0], args[1:])
	case "pause", "resume":
		return outboxPause(ctx, c, args[0], args[1:])
	case "compact":
		return outboxCompact(ctx, c, args[1:])
	case "-h", "-help", "--help":
		code, _ := c.parse(c.flags("outbox"), []string{"-h"})
		return code
	}
	return c.misuse("outbox: unknown action %q", args[0])
}

func outboxFlags(c *cli, name string) (fs *flag.FlagSet, file *string, asJSON *bool) {
	fs = c.flags(name)
	return fs, fs.String("config", "", "configuration `FILE` of the broker"), fs.Bool("json", false, "write JSON")
}

func outboxList(ctx context.Context, c *cli, args []string) int {
	fs, file, asJSON := outboxFlags(c, "outbox ls")
	q := url.Values{}
	for name, about := range map[string]string{
		"id": "only this webhook-id", "rule": "only of this rule", "destination": "only to this destination",
		"state": "only queued or only dead", "older_than": "only what was published longer ago than this `DURATION`",
		"limit": "list `N` at the most (default 100)",
	} {
		fs.Func(strings.ReplaceAll(name, "_", "-"), about, func(v string) error {
			q.Set(name, v)
			_, err := admin.ParseFilter(url.Values{name: {v}})
			return errors.Unwrap(err) // the flag's name is told anyway
		})
	}
	if code, done := c.parse(fs, args); done {
		return code
	}
	if fs.NArg() > 0 {
		return c.misuse("outbox ls: unexpected argument %q", fs.Arg(0))
	}
	l, code := ofOutbox(ctx, c, *file, outboxCall[admin.Listing]{
		running: func(a adminConfig) (admin.Listing, error) { return askListing(ctx, a, "/api/v1/outbox?"+q.Encode()) },
		atRest: func(o admin.Outbox) (admin.Listing, error) {
			f, _ := admin.ParseFilter(q) // parsed above
			return admin.List(o, f)
		},
	})
	if code != exitOK {
		return code
	}
	if *asJSON {
		return c.writeJSON(l)
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATE\tRULE\tDESTINATION\tAGE\tATTEMPTS\tTRACE\tWHY")
	for _, r := range l.Records {
		why := r.Reason
		if r.LastError != "" {
			why = strings.TrimPrefix(why+": "+r.LastError, ": ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%v\t%d\t%s\t%s\n", printable(r.ID), r.State, r.Rule, r.Destination+printable(target(r)),
			time.Since(r.Published).Round(time.Second), r.Attempts, printable(r.TraceID), printable(why))
	}
	if err := w.Flush(); err != nil {
		return c.fail(err, "")
	}
	if l.More {
		fmt.Fprintln(c.stderr, "there are more; -limit lists up to 10000")
	}
	c.tellPaused(l.Paused)
	return exitOK
}

// target is where a record goes in its destination, cut to what a table has room for.
func target(r admin.Record) string {
	const most = 48
	t := r.Path
	if r.Query != "" {
		t += "?" + r.Query
	}
	if len(t) > most {
		t = t[:most] + "..."
	}
	return t
}

func outboxShow(ctx context.Context, c *cli, args []string) int {
	fs, file, asJSON := outboxFlags(c, "outbox show")
	rest, code, done := c.parseMixed(fs, args)
	switch {
	case done:
		return code
	case len(rest) != 1:
		return c.misuse("outbox show: expected one webhook-id")
	}
	id := rest[0]
	l, code := ofOutbox(ctx, c, *file, outboxCall[admin.Listing]{
		running: func(a adminConfig) (admin.Listing, error) {
			return askListing(ctx, a, "/api/v1/outbox/"+url.PathEscape(id))
		},
		atRest: func(o admin.Outbox) (admin.Listing, error) { return admin.Show(o, id) },
	})
	switch {
	case code != exitOK:
		return code
	case len(l.Records) == 0:
		return c.fail(fmt.Errorf("no record or dead letter has the webhook-id %q", id), "")
	case *asJSON:
		return c.writeJSON(l)
	}
	for i, r := range l.Records {
		if i > 0 {
			fmt.Fprintln(c.stdout)
		}
		showRecord(c.stdout, r)
	}
	return exitOK
}

func showRecord(out io.Writer, r admin.Record) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name string, v any) {
		if s := fmt.Sprint(v); s != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, printable(s))
		}
	}
	row("id", r.ID)
	row("state", r.State)
	row("reason", r.Reason)
	row("rule", r.Rule)
	row("destination", r.Destination)
	if r.Lane != nil {
		row("lane", *r.Lane)
	}
	row("topic", r.Topic)
	row("clientid", r.ClientID)
	row("published", r.Published.Format(time.RFC3339Nano))
	row("attempts", r.Attempts)
	if !r.Next.IsZero() {
		row("next", r.Next.Format(time.RFC3339))
	}
	row("last error", r.LastError)
	if r.Status != 0 {
		row("last status", r.Status)
	}
	row("trace", r.TraceID)
	row("rule set", r.Generation)
	row("path", r.Path)
	row("query", r.Query)
	for _, h := range r.Headers {
		row("header", h.Name+": "+h.Value)
	}
	row("body", r.Body)
	if len(r.BodyBase64) > 0 {
		row("body", strconv.Itoa(len(r.BodyBase64))+" bytes that are no text")
	}
	row("response", r.Response)
	if len(r.ResponseBase64) > 0 {
		row("response", strconv.Itoa(len(r.ResponseBase64))+" bytes that are no text")
	}
	_ = w.Flush() // to a terminal or a pipe that is gone
}

// outboxCall is one question to an outbox, in the two ways to ask it.
type outboxCall[T any] struct {
	running func(adminConfig) (T, error)
	atRest  func(admin.Outbox) (T, error)
	defined bool // at rest, the destinations of the rule files are known too
}

// ofOutbox asks the running broker, or opens the data directory if none runs.
// Unless the code is exitOK, the error has been told; what came with it is returned.
func ofOutbox[T any](ctx context.Context, c *cli, file string, call outboxCall[T]) (answer T, code int) {
	cfg, ok := c.configFor(file)
	if !ok {
		return answer, exitProblem
	}
	answer, hint, err := askOutbox(ctx, c, cfg, call)
	if err != nil {
		return answer, c.fail(err, hint)
	}
	return answer, exitOK
}

// A noOutboxError says that there is neither a broker nor its data.
type noOutboxError struct{ text string }

func (e *noOutboxError) Error() string { return e.text }

// askOutbox is ofOutbox for who tells the error otherwise; hint is what to do about it, if there is something.
func askOutbox[T any](ctx context.Context, c *cli, cfg config, call outboxCall[T]) (answer T, hint string, err error) {
	if cfg.Admin.Address != "" {
		switch answer, err := call.running(cfg.Admin); {
		case err == nil:
			return answer, "", nil
		case !errors.Is(err, syscall.ECONNREFUSED):
			hint := "admin in the configuration must be as the broker has it; something answers on " + cfg.Admin.Address
			if told, ok := errors.AsType[brokerError](err); ok {
				hint = told.hint
			}
			return answer, hint, err
		}
	}
	address := strconv.Quote(cfg.Admin.Address)
	nobody, but := "no broker answers on the admin address "+address, "none answers on the admin address "+address
	if cfg.Admin.Address == "" {
		nobody = "without an admin.address no broker can be asked"
		but = nobody
	}
	name := filepath.Join(cfg.DataDir, storeFile)
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return answer, "-config names the broker's configuration file", &noOutboxError{nobody + ", and there is no " + name}
	}
	answer, err = openAtRest(ctx, c, cfg, name, call)
	if errors.Is(err, store.ErrLocked) {
		hint = "a broker runs on this data directory, but " + but
	}
	return answer, hint, err
}

// rulesAtRest is the set that a broker would start with; nil if there is none. What is wrong with the files is not for
// a command to say that looks at the outbox.
func (c *cli) rulesAtRest(cfg config) *rules.Set {
	if cfg.Rules.Dir == "" {
		return nil
	}
	o := rules.LoadOptions{LookupEnv: c.env} // secrets may be the broker's alone
	set, _ := rules.Load([]string{cfg.Rules.Dir}, o)
	if set == nil {
		set, _ = rules.LoadKept(cfg.DataDir, o)
	}
	return set
}

func openAtRest[T any](ctx context.Context, c *cli, cfg config, name string, call outboxCall[T]) (answer T, err error) {
	st, err := store.Open(name, store.Options{Buckets: outbox.Buckets(), LockTimeout: 200 * time.Millisecond})
	if err != nil {
		return answer, err
	}
	defer func() { err = errors.Join(err, st.Close(ctx)) }()
	set := c.rulesAtRest(cfg)
	o, err := outbox.Open(st, outbox.Options{MaxBytes: cfg.Outbox.MaxBytes, Caps: caps(cfg.Outbox, set)})
	if err != nil {
		return answer, err
	}
	if call.defined && set != nil {
		o.Know(destinationNames(set)...)
	}
	return call.atRest(bridge.NewOperator(o, nil))
}

// dialable is where a broker that listens on address is reached from its own host:
// one that listens everywhere answers to no Host that says so.
func dialable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("localhost", port)
	}
	return address
}

// askListing gets a listing from the admin API. The API's own 404 is an empty one.
func askListing(ctx context.Context, a adminConfig, path string) (l admin.Listing, err error) {
	r, err := askBroker(ctx, a, http.MethodGet, path, nil)
	switch {
	case err != nil:
		return l, err
	case r.status == http.StatusNotFound && r.problem:
		return l, nil
	case r.status != http.StatusOK:
		return l, r.refused()
	}
	return l, readAnswer(r.body, &l)
}

// reply is an answer of the admin API.
type reply struct {
	status  int
	text    string // of the status
	problem bool   // the body is a problem, so it comes from a broker
	body    []byte
}

// refused is the error of a reply that is none of those hoped for.
func (r reply) refused() error {
	const enough = 200 // of a page of something else
	var problem struct {
		Detail string `json:"detail"`
	}
	if r.problem && json.Unmarshal(r.body, &problem) == nil && problem.Detail != "" {
		err := fmt.Errorf("ask the broker: %s: %s", r.text, printable(problem.Detail))
		if r.status == http.StatusUnauthorized {
			return brokerError{err, "admin.token in the configuration must be the broker's"}
		}
		return err
	}
	body := strings.Join(strings.Fields(string(r.body)), " ")
	if len(body) > enough {
		body = strings.ToValidUTF8(body[:enough], "") + "..."
	}
	return fmt.Errorf("ask the broker: %s: %s", r.text, printable(body))
}

// askBroker sends one request to the admin API.
func askBroker(ctx context.Context, a adminConfig, method, path string, body []byte) (r reply, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+dialable(a.Address)+path, bytes.NewReader(body))
	if err != nil {
		return r, err
	}
	if a.Token != "" {
		req.Header.Set("Authorization", "Bearer "+a.Token)
	}
	direct := &http.Transport{} // no proxy: the token is for the broker alone
	defer direct.CloseIdleConnections()
	resp, err := direct.RoundTrip(req)
	if err != nil {
		return r, fmt.Errorf("ask the broker: %w", err)
	}
	defer resp.Body.Close()
	r = reply{status: resp.StatusCode, text: resp.Status, problem: resp.Header.Get("Content-Type") == "application/problem+json"}
	if r.body, err = io.ReadAll(io.LimitReader(resp.Body, maxListing)); err != nil {
		return r, fmt.Errorf("ask the broker: %w", err)
	}
	return r, nil
}

func readAnswer(body []byte, v any) error {
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("ask the broker: read its answer: %w", err)
	}
	return nil
}

func (c *cli) writeJSON(v any) int {
	e := json.NewEncoder(c.stdout)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return c.fail(err, "")
	}
	return exitOK
}

// printable replaces what a terminal might act on: ids, topics and answers come from outside.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != ' ' && !strconv.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}
