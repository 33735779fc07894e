package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// demoRules are the rules that the demo runs on; NOTIFICATION_CENTER in them is
// replaced with the address of the demo's own.
//
//go:embed demo/*.yaml
var demoRules embed.FS

const (
	demoPace  = 400 * time.Millisecond // between two messages of the demo
	demoDrain = 10 * time.Second       // for what was accepted to arrive, and its trace to be reported
)

// runDemo runs everything in one process on free loopback ports.
func runDemo(ctx context.Context, c *cli, args []string) int {
	fs := c.flags("demo")
	length := fs.Duration("for", 0, "stop after this long and exit 1 if a trace is broken or an accepted match undelivered; 0: until interrupted")
	if code, done := c.parse(fs, args); done {
		return code
	}
	switch {
	case fs.NArg() > 0:
		return c.misuse("demo: unexpected argument %q", fs.Arg(0))
	case *length < 0:
		return c.misuse("demo: -for %v is negative", *length)
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	d, err := newDemo(ctx, c.stdout, slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		return c.fail(err, "")
	}
	defer d.close()
	return d.run(ctx, *length)
}

// demo is a whole fleet in one process.
type demo struct {
	out       io.Writer
	dir       string // temporary: data and rules
	collector *tracectxtest.Collector
	center    *center
	app       *app
	vehicles  []*vehicle
	closers   []func()
	drain     time.Duration // how long settle waits

	mu       sync.Mutex
	accepted map[string]acceptedMatch // by vin-seq: acknowledged, and due to be delivered
	shown    map[string]bool          // deliveries whose trace was printed
}

// acceptedMatch is what the demo owes: a delivery that belongs to a trace of root.
type acceptedMatch struct{ root string }

func newDemo(ctx context.Context, out io.Writer, log *slog.Logger) (_ *demo, err error) {
	d := &demo{out: out, drain: demoDrain, accepted: map[string]acceptedMatch{}, shown: map[string]bool{}}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	if d.dir, err = os.MkdirTemp("", "throughline-demo-"); err != nil {
		return nil, err
	}
	d.onClose(func() { os.RemoveAll(d.dir) })
	if d.collector, err = tracectxtest.NewCollector(); err != nil {
		return nil, err
	}
	d.onClose(d.collector.Stop)
	centerTracer, err := d.tracer("notification-center", log)
	if err != nil {
		return nil, err
	}
	if d.center, err = newCenter(ctx, centerTracer); err != nil {
		return nil, err
	}
	d.onClose(d.center.close)
	if err := d.writeRules(); err != nil {
		return nil, err
	}

	cfg := defaultConfig()
	cfg.Listeners = []listenerConfig{{Name: "tcp", Address: "127.0.0.1:0"}}
	cfg.Auth.Anonymous = true
	cfg.Admin.Address = "127.0.0.1:0"
	cfg.DataDir = filepath.Join(d.dir, "data")
	cfg.Rules.Dir = filepath.Join(d.dir, "rules.d")
	cfg.Trace.Collector = d.collector.Addr()
	cfg.Trace.Instance = defaultInstance()
	if d.app, err = startApp(ctx, cfg, log); err != nil {
		return nil, err
	}
	d.onClose(func() { _ = d.app.stop() }) // run has stopped it already, or the demo has failed anyway
	return d, d.connectVehicles(ctx, log)
}

func (d *demo) onClose(f func()) { d.closers = append(d.closers, f) }

func (d *demo) close() {
	for _, f := range slices.Backward(d.closers) {
		f()
	}
	d.closers = nil
}

// tracer returns the tracer of a service of the demo other than the broker: each
// reports for itself, as the services of a fleet do.
func (d *demo) tracer(service string, log *slog.Logger) (tracectx.Tracer, error) {
	r, err := skywalking.NewReporter(skywalking.ReporterOptions{
		Address: d.collector.Addr(), CloseTimeout: time.Second, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	d.onClose(r.Close)
	return skywalking.NewTracer(skywalking.Options{Service: service, Instance: defaultInstance(), Sample: 1, Reporter: r})
}

func (d *demo) writeRules() error {
	if err := os.Mkdir(filepath.Join(d.dir, "rules.d"), 0o755); err != nil {
		return err
	}
	names, err := fs.Glob(demoRules, "demo/*.yaml")
	if err != nil {
		return err
	}
	for _, name := range names {
		src, err := demoRules.ReadFile(name)
		if err != nil {
			return err
		}
		text := strings.ReplaceAll(string(src), "NOTIFICATION_CENTER", d.center.address)
		if err := os.WriteFile(filepath.Join(d.dir, "rules.d", filepath.Base(name)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) connectVehicles(ctx context.Context, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	broker := d.app.mqttAddress()
	for _, v := range []*vehicle{
		{name: "agv-1", about: "MQTT 3.1.1, context in the payload"},
		{name: "agv-2", about: "MQTT 5, context in user properties"},
		{name: "agv-3", about: "MQTT 3.1.1, knows nothing of traces"},
	} {
		v.broker = broker
		var err error
		if v.name != "agv-3" {
			if v.tracer, err = d.tracer(v.name, log); err != nil {
				return err
			}
		}
		if v.name == "agv-2" {
			v.client, err = dialMQTT5(ctx, broker, v.name)
		} else {
			v.client, err = dialMQTT311(ctx, broker, v.name)
		}
		if err != nil {
			return err
		}
		d.onClose(v.client.close)
		d.vehicles = append(d.vehicles, v)
	}
	return nil
}

// run publishes until ctx ends or length is over, then waits for what was accepted
// and judges the traces.
func (d *demo) run(ctx context.Context, length time.Duration) int {
	fmt.Fprintf(d.out, "broker               mqtt://%s, admin http://%s\n", d.app.mqttAddress(), d.app.adminAddress())
	fmt.Fprintf(d.out, "notification center  http://%s/notify\n", d.center.address)
	fmt.Fprintf(d.out, "collector            %s (SkyWalking's native protocol)\n", d.collector.Addr())
	for _, v := range d.vehicles {
		fmt.Fprintf(d.out, "vehicle %-12s %s\n", v.name, v.about)
	}
	fmt.Fprintln(d.out)

	publishing := ctx
	if length > 0 {
		var cancel context.CancelFunc
		publishing, cancel = context.WithTimeout(ctx, length)
		defer cancel()
	}
	d.publish(publishing, ctx)

	problems := d.settle()
	if err := d.app.stop(); err != nil {
		problems = append(problems, "broker did not stop cleanly: "+err.Error())
	}
	fmt.Fprintf(d.out, "%d matches accepted, %d delivered, %d traces shown\n", len(d.accepted), d.center.count(), len(d.shown))
	for _, p := range problems {
		fmt.Fprintln(d.out, "broken:", p)
	}
	if len(problems) > 0 || len(d.accepted) == 0 {
		if len(d.accepted) == 0 {
			fmt.Fprintln(d.out, "broken: no match was accepted")
		}
		return exitProblem
	}
	fmt.Fprintln(d.out, "every accepted match was delivered, every trace is unbroken")
	return exitOK
}

// publish lets the vehicles take turns until publishing ends. What is under way then
// is finished, unless ctx ends too.
func (d *demo) publish(publishing, ctx context.Context) {
	tick := time.NewTicker(demoPace)
	defer tick.Stop()
	for seq := 0; ; seq++ {
		v := d.vehicles[seq%len(d.vehicles)]
		hard := (seq/len(d.vehicles))%2 == 0 // each vehicle brakes hard every other time
		decel := 2.5
		if hard {
			decel = 7 + float64(seq%10)/10
		}
		send, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		err := v.send(send, seq, decel)
		cancel()
		switch {
		case err != nil:
			fmt.Fprintf(d.out, "%s: publish %d was not acknowledged: %v\n", v.name, seq, err)
		case hard:
			d.accept(v, seq)
		}
		d.show()
		select {
		case <-tick.C:
		case <-publishing.Done():
			return
		}
	}
}

func (d *demo) accept(v *vehicle, seq int) {
	root := "mqtt-broker"
	if v.tracer != nil {
		root = v.name
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.accepted[deliveryKey(v.name, seq)] = acceptedMatch{root}
}

func deliveryKey(vin string, seq int) string { return fmt.Sprintf("%s-%d", vin, seq) }

// show prints each delivery whose trace is complete and was not printed before.
func (d *demo) show() {
	segments := d.collector.Segments()
	for _, got := range d.center.deliveries() {
		if d.shown[got.key] {
			continue
		}
		trace := segmentsOf(segments, got.traceID)
		if !d.complete(trace, got) {
			continue
		}
		d.shown[got.key] = true
		fmt.Fprintf(d.out, "%s  %s  webhook-id %s\n%s\n", got.at.Format("15:04:05.000"), got.key, got.id, got.body)
		for _, t := range tracectxtest.Trees(trace) {
			_ = t.Write(d.out) // the demo ends when its output does
		}
		fmt.Fprintln(d.out)
	}
}

// complete reports whether the collector has all of a delivery's trace: the center's
// segment, and a way from it back to where the trace must begin.
func (d *demo) complete(trace []*tracectxtest.Segment, got centerDelivery) bool {
	d.mu.Lock()
	want, ok := d.accepted[got.key]
	d.mu.Unlock()
	return ok && len(tracectxtest.Broken(trace)) == 0 && leadsTo(trace, got.segmentID, want.root)
}

// leadsTo follows the references from a segment back to the first one, and reports
// whether that is of service root.
func leadsTo(segments []*tracectxtest.Segment, id, root string) bool {
	byID := map[string]*tracectxtest.Segment{}
	for _, s := range segments {
		byID[s.ID] = s
	}
	for range len(segments) + 1 {
		s := byID[id]
		if s == nil {
			return false
		}
		refs := s.Span(0).Refs
		if len(refs) == 0 {
			return s.Service == root
		}
		id = refs[0].SegmentID
	}
	return false
}

func segmentsOf(all []*tracectxtest.Segment, traceID string) []*tracectxtest.Segment {
	var of []*tracectxtest.Segment
	for _, s := range all {
		if s.TraceID == traceID {
			of = append(of, s)
		}
	}
	return of
}

// settle waits, bounded, until all that was accepted has arrived and its trace is
// complete, and returns what is missing then.
func (d *demo) settle() []string {
	for end := time.Now().Add(d.drain); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if d.show(); len(d.shown) == len(d.accepted) {
			break
		}
	}
	var problems []string
	arrived := map[string]centerDelivery{}
	for _, got := range d.center.deliveries() {
		arrived[got.key] = got
	}
	segments := d.collector.Segments()
	for key, want := range d.accepted {
		got, ok := arrived[key]
		switch {
		case !ok:
			problems = append(problems, key+": accepted and not delivered")
		case got.err != nil:
			problems = append(problems, key+": "+got.err.Error())
		case !d.shown[key]:
			trace := segmentsOf(segments, got.traceID)
			why := errors.New("no way back to " + want.root)
			if b := tracectxtest.Broken(trace); len(b) > 0 {
				why = errors.New(strings.Join(b, "; "))
			}
			problems = append(problems, fmt.Sprintf("%s: trace %s: %v", key, got.traceID, why))
		}
	}
	slices.Sort(problems)
	return append(problems, tracectxtest.Broken(segments)...)
}
