package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
)

// config is broker.yaml with its defaults filled in and the environment applied.
type config struct {
	Listeners []listenerConfig
	Auth      authConfig
	DataDir   string
	Rules     rulesConfig
	Outbox    outboxConfig
	Trace     traceConfig
	Admin     adminConfig
	Limits    limitsConfig
	Log       logConfig
}

type listenerConfig struct {
	Name    string
	Address string // host:port; port 0 picks a free one
}

type authConfig struct {
	Anonymous bool
}

type rulesConfig struct {
	Dir   string // "": no rules
	Watch bool
}

type outboxConfig struct {
	MaxBytes               int64
	MaxBytesPerDestination int64
	OnFull                 string // rules.OnFullRefuse or rules.OnFullAckAndCount
	MinFree                int64  // to stay free on the file system; defaultMinFree: as that says, 0: nothing
}

// defaultMinFree stands for the smaller of 256 MiB and a twentieth of the file system.
const defaultMinFree = -1

type traceConfig struct {
	Service       string
	Instance      string
	Collector     string // host:port; "": contexts flow, nothing is reported
	Token         string
	TLS           *tls.Config // nil: plain text
	Sample        float64
	PayloadFields tracectx.Fields
}

type adminConfig struct {
	Address string // "": no admin listener
	Token   string
	Hosts   []string
}

type limitsConfig struct {
	MaxPacketSize             int64
	ConnectTimeout            time.Duration
	MaxConnections            int
	MaxSubscriptionsPerClient int
}

type logConfig struct {
	Level  slog.Level
	Format string // text | json
}

// defaultConfig is what `broker serve` runs without a file.
func defaultConfig() config {
	return config{
		Listeners: []listenerConfig{{Name: "tcp", Address: "127.0.0.1:1883"}},
		DataDir:   "data",
		Rules:     rulesConfig{Watch: true},
		Outbox: outboxConfig{
			MaxBytes: 10 << 30, MaxBytesPerDestination: 4 << 30, OnFull: rules.OnFullRefuse, MinFree: defaultMinFree,
		},
		Trace: traceConfig{
			Service:       "mqtt-broker",
			Collector:     "127.0.0.1:11800",
			Sample:        1,
			PayloadFields: tracectx.Fields{SW8: tracectx.HeaderSW8, Correlation: tracectx.HeaderCorrelation},
		},
		Admin: adminConfig{Address: "127.0.0.1:18083"},
		Limits: limitsConfig{
			MaxPacketSize:             1 << 20,
			ConnectTimeout:            5 * time.Second,
			MaxConnections:            100_000,
			MaxSubscriptionsPerClient: 100,
		},
		Log: logConfig{Format: "text"},
	}
}

// loadOptions says how strict loadConfig is and where it looks.
type loadOptions struct {
	// Env looks an environment variable up, as os.LookupEnv does.
	Env func(string) (string, bool)
	// RequireSecrets makes a secret that is missing an error; otherwise it is a warning.
	RequireSecrets bool
}

// loadConfig reads file (none if "") over the defaults, and the environment over
// both. It reports every problem at once; the config is usable if none of them is
// an error. Relative paths in the file are relative to the file's folder.
func loadConfig(file string, o loadOptions) (config, []rules.Problem) {
	c := defaultConfig()
	d := &decoder{file: file, env: o.Env, requireSecrets: o.RequireSecrets}
	anonymousSet, rulesDirSet, listenersBad, tokenSet, capSet := false, false, false, false, false
	var listenersAt, anonymousAt, adminAt, rulesDirAt, serviceAt, collectorAt, fieldsAt, capAt position
	if file != "" {
		d.base = filepath.Dir(file)
		c.DataDir = d.resolve(c.DataDir)
		root := d.read(file)
		d.object(root, "", fields{
			"listeners": func(n node) {
				listenersAt = n.pos()
				c.Listeners = nil
				names := map[string]bool{}
				d.list(n, func(n node) {
					if l, ok := d.listener(n, names); ok {
						c.Listeners = append(c.Listeners, l)
					} else {
						listenersBad = true
					}
				})
				if n.isNull() || n.isList() && len(n.Content) == 0 {
					d.errorf(n, "listeners-empty", "no listener is configured", `- {name: tcp, address: "127.0.0.1:1883"}`)
				}
			},
			"auth": d.into("auth", fields{
				"anonymous":  func(n node) { anonymousSet, anonymousAt = true, n.pos(); d.boolean(n, &c.Auth.Anonymous) },
				"users_file": d.unsupported("auth.users_file"),
				"jwt":        d.unsupported("auth.jwt"),
				"acl_file":   d.unsupported("auth.acl_file"),
			}),
			"data_dir": d.path(&c.DataDir),
			"rules": d.into("rules", fields{
				"dir":   func(n node) { rulesDirSet, rulesDirAt = true, n.pos(); d.path(&c.Rules.Dir)(n) },
				"watch": func(n node) { d.boolean(n, &c.Rules.Watch) },
			}),
			"outbox": d.into("outbox", fields{
				"max_bytes": d.size(&c.Outbox.MaxBytes, rules.MinCap, rules.MaxCap),
				"max_bytes_per_destination": func(n node) {
					capSet, capAt = true, n.pos()
					d.size(&c.Outbox.MaxBytesPerDestination, rules.MinCap, rules.MaxCap)(n)
				},
				"min_free": d.size(&c.Outbox.MinFree, 0, rules.MaxCap),
				"on_full":  d.oneOf(&c.Outbox.OnFull, rules.OnFullRefuse, rules.OnFullAckAndCount),
			}),
			"trace": d.into("trace", fields{
				"service":   func(n node) { serviceAt = n.pos(); d.text(&c.Trace.Service)(n) },
				"instance":  d.text(&c.Trace.Instance),
				"collector": func(n node) { collectorAt = n.pos(); d.text(&c.Trace.Collector)(n) },
				"sample":    d.share(&c.Trace.Sample),
				"payload_fields": func(n node) {
					fieldsAt = n.pos()
					d.object(n, "trace.payload_fields", fields{
						tracectx.HeaderSW8:         d.text(&c.Trace.PayloadFields.SW8),
						tracectx.HeaderCorrelation: d.text(&c.Trace.PayloadFields.Correlation),
					})
				},
				"subscribers": d.only("trace.subscribers", "passthrough", "relay"),
				"formats":     d.unsupported("trace.formats"),
			}),
			"admin": func(n node) {
				adminAt = n.pos()
				d.into("admin", fields{
					"address": d.text(&c.Admin.Address),
					"token":   func(n node) { tokenSet = true; d.secret(&c.Admin.Token)(n) },
					"hosts":   d.texts(&c.Admin.Hosts),
				})(n)
			},
			"limits": d.into("limits", fields{
				"max_packet_size":              d.size(&c.Limits.MaxPacketSize, 128, 256<<20),
				"connect_timeout":              d.duration(&c.Limits.ConnectTimeout, 100*time.Millisecond, time.Minute),
				"max_connections":              d.integer(&c.Limits.MaxConnections, 1, 1<<24),
				"max_subscriptions_per_client": d.integer(&c.Limits.MaxSubscriptionsPerClient, 1, 1<<20),
			}),
			"log": d.into("log", fields{
				"level":  d.level(&c.Log.Level),
				"format": d.oneOf(&c.Log.Format, "text", "json"),
			}),
		})
	}
	d.environment(&c)

	loopback := true
	for _, l := range c.Listeners {
		loopback = loopback && auth.Loopback(l.Address)
	}
	if !anonymousSet {
		c.Auth.Anonymous = loopback
	}
	switch {
	case listenersBad: // what they are is not known
	case !loopback && c.Auth.Anonymous && anonymousSet:
		d.warnAt(anonymousAt, "anonymous-beyond-loopback", "anonymous clients may connect from beyond this host, but without an acl_file they may neither publish nor subscribe", "")
	case !c.Auth.Anonymous:
		at := listenersAt
		if anonymousSet {
			at = anonymousAt
		}
		d.warnAt(at, "nobody-may-connect", "anonymous clients are refused and no other way to authenticate is configured: nobody can connect", "anonymous: true, with listeners on loopback addresses only")
	}
	if !rulesDirSet {
		c.Rules.Dir = ""
		if fi, err := os.Stat(d.resolve("rules.d")); err == nil && fi.IsDir() {
			c.Rules.Dir = d.resolve("rules.d")
		}
	} else if fi, err := os.Stat(c.Rules.Dir); err != nil || !fi.IsDir() {
		d.problemAt(rulesDirAt, rules.Error, "rules-dir", "rules folder "+strconv.Quote(c.Rules.Dir)+": "+notAFolder(err), "")
	}
	if capSet && c.Outbox.MaxBytesPerDestination > c.Outbox.MaxBytes {
		d.warnAt(capAt, "cap-above-outbox", "outbox.max_bytes_per_destination is more than the whole outbox may have, "+rules.FormatSize(c.Outbox.MaxBytes)+" (outbox.max_bytes)", "")
	}
	if c.Admin.Address != "" {
		if msg := checkAddress(c.Admin.Address); msg != "" {
			d.problemAt(adminAt, rules.Error, "address", "admin.address "+msg, "")
		} else if !auth.Loopback(c.Admin.Address) && !tokenSet {
			d.problemAt(adminAt, rules.Error, "admin-token", "admin.address is reachable from beyond this host and no admin.token is set", `token: "${file:/run/secrets/admin}"`)
		}
	}
	if c.Trace.Collector != "" {
		if msg := checkAddress(c.Trace.Collector); msg != "" {
			d.problemAt(collectorAt, rules.Error, "address", "trace.collector "+msg, "")
		}
	}
	if c.Trace.Service == "" {
		d.problemAt(serviceAt, rules.Error, "trace-service", "trace.service is empty", "")
	}
	if _, err := tracectx.NewExtractor(c.Trace.PayloadFields); err != nil {
		d.problemAt(fieldsAt, rules.Error, "payload-fields", "trace.payload_fields: "+err.Error(), "")
	}
	if c.Trace.Instance == "" {
		c.Trace.Instance = defaultInstance()
	}
	slices.SortStableFunc(d.problems, func(a, b rules.Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	return c, d.problems
}

// defaultInstance is host@pid, as SkyWalking's agents make it up.
func defaultInstance() string {
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	return host + "@" + strconv.Itoa(os.Getpid())
}

// listener reads one entry of listeners; names are those that were taken before it.
func (d *decoder) listener(n node, names map[string]bool) (l listenerConfig, ok bool) {
	before := len(d.problems)
	var nameAt, addressAt = n, n
	d.object(n, "listeners", fields{
		"name":      func(v node) { nameAt = v; d.text(&l.Name)(v) },
		"address":   func(v node) { addressAt = v; d.text(&l.Address)(v) },
		"transport": d.only("listeners.transport", "tcp", "websocket", "unix"),
		"path":      d.unsupported("listeners.path"),
		"tls":       d.unsupported("listeners.tls"),
	})
	if len(d.problems) > before || !n.isObject() {
		if n.isNull() {
			d.expected(n, "an object")
		}
		return l, false
	}
	switch msg := checkAddress(l.Address); {
	case l.Name == "":
		d.errorf(nameAt, "listener-name", "a listener has no name", "name: tcp")
	case names[l.Name]:
		d.errorf(nameAt, "listener-doubled", fmt.Sprintf("listener name %q is used twice", l.Name), "")
	case msg != "":
		d.errorf(addressAt, "address", fmt.Sprintf("the address of listener %q %s", l.Name, msg), `address: "127.0.0.1:1883"`)
	default:
		names[l.Name] = true
		return l, true
	}
	return l, false
}

// environment applies the variables that SkyWalking's own agents read.
// https://skywalking.apache.org/docs/skywalking-go/latest/en/advanced-features/settings-override/
func (d *decoder) environment(c *config) {
	set := func(name string, apply func(string) error) {
		v, ok := d.lookup(name)
		if !ok || v == "" {
			return
		}
		if err := apply(v); err != nil {
			d.problems = append(d.problems, rules.Problem{
				File: "environment", Severity: rules.Error, Name: "environment", Message: fmt.Sprintf("%s=%q: %v", name, v, err),
			})
		}
	}
	text := func(to *string) func(string) error {
		return func(v string) error { *to = v; return nil }
	}
	set("SW_AGENT_NAME", text(&c.Trace.Service))
	set("SW_AGENT_INSTANCE_NAME", text(&c.Trace.Instance))
	set("SW_AGENT_REPORTER_GRPC_BACKEND_SERVICE", func(v string) error {
		if msg := checkAddress(v); msg != "" {
			return errors.New(msg)
		}
		c.Trace.Collector = v
		return nil
	})
	set("SW_AGENT_REPORTER_GRPC_AUTHENTICATION", text(&c.Trace.Token))
	set("SW_AGENT_REPORTER_GRPC_TLS_ENABLE", func(v string) error {
		on, err := strconv.ParseBool(v)
		if err != nil {
			return errors.New("neither true nor false")
		}
		if on {
			c.Trace.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		return nil
	})
	set("SW_AGENT_SAMPLE", func(v string) error {
		f, err := strconv.ParseFloat(v, 64)
		if err != nil || !(f >= 0 && f <= 1) {
			return errors.New("not a number from 0 to 1")
		}
		c.Trace.Sample = f
		return nil
	})
}

func notAFolder(err error) string {
	switch {
	case err == nil:
		return "not a folder"
	case errors.Is(err, fs.ErrNotExist):
		return "no such folder"
	default:
		return err.Error()
	}
}

// checkAddress says what is wrong with a host:port, "" if nothing is.
func checkAddress(a string) string {
	if a == "" {
		return "is missing"
	}
	_, port, err := net.SplitHostPort(a)
	if err != nil {
		return "is no host:port: " + strconv.Quote(a)
	}
	if p, err := strconv.Atoi(port); err != nil || p < 0 || p > 65535 {
		return "has no port from 0 to 65535: " + strconv.Quote(a)
	}
	return ""
}
