// The view of a fleet service built on client-go while the agents of its cluster are replaced.
//
//	client watch KUBECONFIG NAMESPACE      informers of ConfigMaps, typed (protobuf) and dynamic (JSON): a line for each one that is new
//	client load KUBECONFIG get|get-and-post  four clients with a connection each, two over HTTP/2: GETs, or one in five a POST
//
// SIGTERM ends both. load then prints a summary on one line; its exit code is 1 if a request failed.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	if len(os.Args) < 4 {
		log.Fatal("client watch KUBECONFIG NAMESPACE, or client load KUBECONFIG get|get-and-post")
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Args[2])
	check(err)
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch os.Args[1] {
	case "watch":
		watch(told, config, os.Args[3])
	case "load":
		if load(told, config, os.Args[3] == "get-and-post") > 0 {
			os.Exit(1)
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// The two kinds of informers that controllers use. They share the reflector, which lists again if a watch ends unexpectedly.
func watch(told context.Context, config *rest.Config, namespace string) {
	binary := rest.CopyConfig(config)
	binary.ContentType = runtime.ContentTypeProtobuf
	typed, err := kubernetes.NewForConfig(binary)
	check(err)
	untyped, err := dynamic.NewForConfig(config)
	check(err)
	maps := schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	forTyped := informers.NewSharedInformerFactoryWithOptions(typed, 0, informers.WithNamespace(namespace))
	forUntyped := dynamicinformer.NewFilteredDynamicSharedInformerFactory(untyped, 0, namespace, nil)
	say("protobuf", forTyped.Core().V1().ConfigMaps().Informer())
	say("json", forUntyped.ForResource(maps).Informer())
	forTyped.Start(told.Done())
	forUntyped.Start(told.Done())
	<-told.Done()
}

func say(kind string, informer cache.SharedIndexInformer) {
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(object any) {
		made, err := meta.Accessor(object)
		check(err)
		fmt.Println(kind, made.GetName())
	}})
	check(err)
}

const review = `{"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
	"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}}`

// Closed loops that read every response to the end. Go's transport retries only requests that were certainly not sent, so a failure here is a
// failure for every client. Returns the number of failures.
func load(told context.Context, config *rest.Config, posts bool) int {
	var (
		lock   sync.Mutex
		all    sync.WaitGroup
		took   []time.Duration
		failed []string
		start  = time.Now()
	)
	for number := range 4 {
		own := rest.CopyConfig(config)
		// Its own dialer keeps client-go from sharing one connection among all clients.
		own.Dial = (&net.Dialer{}).DialContext
		if number%2 == 1 {
			own.NextProtos = []string{"http/1.1"}
		}
		client, err := rest.HTTPClientFor(own)
		check(err)
		all.Go(func() {
			for count := 1; told.Err() == nil; count++ {
				began := time.Now()
				err := ask(client, config.Host, posts && count%5 == 0)
				lock.Lock()
				took = append(took, time.Since(began))
				if err != nil {
					failed = append(failed, fmt.Sprintf("after %.1f s, %.1f s long: %v", began.Sub(start).Seconds(), time.Since(began).Seconds(), err))
				}
				lock.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	all.Wait()
	slices.Sort(took)
	at := func(part float64) int64 { return took[int(float64(len(took)-1)*part)].Milliseconds() }
	fmt.Printf("%d requests in %.0f s, %d failed, p50 %d ms, p99 %d ms, slowest %d ms\n",
		len(took), time.Since(start).Seconds(), len(failed), at(0.5), at(0.99), at(1))
	for _, one := range failed[:min(len(failed), 20)] {
		fmt.Println("failed", one)
	}
	return len(failed)
}

func ask(client *http.Client, host string, post bool) error {
	var (
		answer *http.Response
		err    error
		wanted = http.StatusOK
	)
	if post {
		wanted = http.StatusCreated
		answer, err = client.Post(host+"/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "application/json", bytes.NewBufferString(review))
	} else {
		answer, err = client.Get(host + "/api/v1/namespaces/default")
	}
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != wanted {
		err = fmt.Errorf("%s: %.200s %v", answer.Status, text, answer.Header["Warning"])
	}
	return err
}
